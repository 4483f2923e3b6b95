#include "conv_bn_stats_launch.cuh"

int resnet_fused::launch_conv_bn_stats_float16(const ConvBnStatsArguments& arguments,
                                               int configuration, void* stream) {
  return launch_conv_bn_stats<Float16>(arguments, configuration, stream);
}
