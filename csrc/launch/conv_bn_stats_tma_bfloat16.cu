#include "conv_bn_stats_tma_launch.cuh"

int resnet_fused::launch_conv_bn_stats_tma_bfloat16(const ConvStatsTmaArguments& arguments,
                                                    int index, int32_t blocks, void* stream) {
  return launch_conv_bn_stats_tma<BFloat16>(arguments, index, blocks, stream);
}
