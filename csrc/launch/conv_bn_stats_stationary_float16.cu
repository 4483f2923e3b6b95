#include "conv_bn_stats_stationary_launch.cuh"

int resnet_fused::launch_conv_bn_stats_stationary_float16(const ConvStatsTmaArguments& arguments,
                                                          int index, int32_t blocks, void* stream) {
  return launch_conv_bn_stats_stationary<Float16>(arguments, index, blocks, stream);
}
