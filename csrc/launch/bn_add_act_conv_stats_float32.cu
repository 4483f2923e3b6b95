#include "bn_add_act_conv_stats_launch.cuh"

int resnet_fused::launch_bn_add_act_conv_stats_float32(const BlockEndArguments& arguments,
                                                       int configuration, void* stream) {
  return launch_bn_add_act_conv_stats<float>(arguments, configuration, stream);
}
