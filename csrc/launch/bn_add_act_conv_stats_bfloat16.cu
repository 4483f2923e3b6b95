#include "bn_add_act_conv_stats_launch.cuh"

int resnet_fused::launch_bn_add_act_conv_stats_bfloat16(const BlockEndArguments& arguments,
                                                        int configuration, void* stream) {
  return launch_bn_add_act_conv_stats<BFloat16>(arguments, configuration, stream);
}
