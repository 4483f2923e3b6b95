#include "bn_add_act_conv_stats_launch.cuh"

int resnet_fused::launch_bn_add_act_conv_stats_float16(const BlockEndArguments& arguments,
                                                       int configuration, void* stream) {
  return launch_bn_add_act_conv_stats<Float16>(arguments, configuration, stream);
}
