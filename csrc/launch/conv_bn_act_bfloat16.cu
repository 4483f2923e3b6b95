#include "conv_bn_act_launch.cuh"

int resnet_fused::launch_conv_bn_act_bfloat16(const ConvBnActArguments& arguments,
                                              int configuration, void* stream) {
  return launch_conv_bn_act<BFloat16>(arguments, configuration, stream);
}
