#include "conv_bn_dgrad_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_float32(const ConvBnDgradArguments& arguments,
                                               int configuration, void* stream) {
  return launch_conv_bn_dgrad<float>(arguments, configuration, stream);
}
