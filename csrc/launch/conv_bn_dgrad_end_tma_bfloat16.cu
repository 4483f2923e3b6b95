#include "conv_bn_dgrad_end_tma_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_end_tma_bfloat16(const ConvBnDgradEndTmaArguments& arguments,
                                                        const ClearedCounters& counters, int index,
                                                        int32_t blocks, void* stream) {
  return launch_conv_bn_dgrad_end_tma<BFloat16>(arguments, counters, index, blocks, stream);
}
