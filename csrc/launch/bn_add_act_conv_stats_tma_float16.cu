#include "bn_add_act_conv_stats_tma_launch.cuh"

int resnet_fused::launch_bn_add_act_conv_stats_tma_float16(const BlockEndTmaArguments& arguments,
                                                           int index, int32_t blocks,
                                                           void* stream) {
  return launch_bn_add_act_conv_stats_tma<Float16>(arguments, index, blocks, stream);
}
