#include "conv_wgrad_tma_launch.cuh"

int resnet_fused::launch_conv_wgrad_tma_bfloat16(const ConvWgradTmaArguments& arguments, int index,
                                                 void* stream) {
  return launch_conv_wgrad_tma<BFloat16>(arguments, index, stream);
}
