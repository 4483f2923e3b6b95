#include "conv_bn_act_launch.cuh"

int resnet_fused::launch_conv_bn_act_float32(const ConvBnActArguments& arguments, int configuration,
                                             void* stream) {
  return launch_conv_bn_act<float>(arguments, configuration, stream);
}
