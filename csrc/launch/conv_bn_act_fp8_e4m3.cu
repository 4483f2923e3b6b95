#include "conv_bn_act_fp8_launch.cuh"

int resnet_fused::launch_conv_bn_act_fp8_e4m3(const ConvTmaArguments& arguments, int index,
                                              int32_t blocks, void* stream) {
  return launch_conv_bn_act_fp8<Float8E4M3>(arguments, index, blocks, stream);
}
