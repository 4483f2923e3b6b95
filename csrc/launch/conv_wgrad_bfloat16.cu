#include "conv_wgrad_launch.cuh"

int resnet_fused::launch_conv_wgrad_bfloat16(const ConvWgradArguments& arguments, int configuration,
                                             void* stream) {
  return launch_conv_wgrad<BFloat16>(arguments, configuration, stream);
}
