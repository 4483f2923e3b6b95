#include "conv_bn_dgrad_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_bfloat16(const ConvBnDgradArguments& arguments,
                                                int configuration, void* stream) {
  return launch_conv_bn_dgrad<BFloat16>(arguments, configuration, stream);
}
