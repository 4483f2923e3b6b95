#include "conv_bn_dgrad_end_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_end_float32(const ConvBnDgradEndArguments& arguments,
                                                   int configuration, void* stream) {
  return launch_conv_bn_dgrad_end<float>(arguments, configuration, stream);
}
