#include "conv_bn_wgrad_launch.cuh"

int resnet_fused::launch_conv_bn_wgrad_float16(const ConvBnWgradArguments& arguments,
                                               int configuration, void* stream) {
  return launch_conv_bn_wgrad<Float16>(arguments, configuration, stream);
}
