#include "conv_bn_stats_stream_launch.cuh"

int resnet_fused::launch_conv_bn_stats_stream_bfloat16(const ConvStatsWindowArguments& arguments,
                                                       int index, const WindowGrid& grid,
                                                       void* stream) {
  return launch_conv_bn_stats_stream<BFloat16>(arguments, index, grid, stream);
}
