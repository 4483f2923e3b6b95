#include "conv_bn_wgrad_launch.cuh"

int resnet_fused::launch_conv_bn_wgrad_float32(const ConvBnWgradArguments& arguments,
                                               int configuration, void* stream) {
  return launch_conv_bn_wgrad<float>(arguments, configuration, stream);
}
