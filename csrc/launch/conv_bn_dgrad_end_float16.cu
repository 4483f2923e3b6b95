#include "conv_bn_dgrad_end_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_end_float16(const ConvBnDgradEndArguments& arguments,
                                                   int configuration, void* stream) {
  return launch_conv_bn_dgrad_end<Float16>(arguments, configuration, stream);
}
