#include "conv_bn_stats_stationary_launch.cuh"

int resnet_fused::launch_conv_bn_stats_stationary_bfloat16(const ConvStatsTmaArguments& arguments,
                                                           int index, int32_t blocks,
                                                           void* stream) {
  return launch_conv_bn_stats_stationary<BFloat16>(arguments, index, blocks, stream);
}
