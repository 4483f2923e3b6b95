#include "conv_bn_dgrad_stream_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_stream_bfloat16(const BnDgradWindowArguments& arguments,
                                                       const ClearedCounters& counters, int index,
                                                       const WindowGrid& grid, void* stream) {
  return launch_conv_bn_dgrad_stream<BFloat16>(arguments, counters, index, grid, stream);
}
