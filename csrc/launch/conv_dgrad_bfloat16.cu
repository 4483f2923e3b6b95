#include "conv_dgrad_launch.cuh"

int resnet_fused::launch_conv_dgrad_bfloat16(const ConvDgradArguments& arguments, int configuration,
                                             void* stream) {
  return launch_conv_dgrad<BFloat16>(arguments, configuration, stream);
}
