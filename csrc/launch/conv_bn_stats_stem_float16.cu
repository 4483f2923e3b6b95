#include "conv_bn_stats_stem_launch.cuh"

int resnet_fused::launch_conv_bn_stats_stem_float16(const ConvStatsStemArguments& arguments,
                                                    int index, int32_t blocks, void* stream) {
  return launch_conv_bn_stats_stem<Float16>(arguments, index, blocks, stream);
}
