#include "bn_add_act_conv_stats_tma_launch.cuh"

int resnet_fused::launch_bn_add_act_conv_stats_tma_bfloat16(const BlockEndTmaArguments& arguments,
                                                            int index, int32_t blocks,
                                                            void* stream) {
  return launch_bn_add_act_conv_stats_tma<BFloat16>(arguments, index, blocks, stream);
}
