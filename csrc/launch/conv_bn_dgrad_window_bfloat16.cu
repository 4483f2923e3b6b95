#include "conv_bn_dgrad_window_launch.cuh"

int resnet_fused::launch_conv_bn_dgrad_window_bfloat16(const BnDgradWindowArguments& arguments,
                                                       const ClearedCounters& counters, int index,
                                                       const WindowGrid& grid, void* stream) {
  return launch_conv_bn_dgrad_window<BFloat16>(arguments, counters, index, grid, stream);
}
