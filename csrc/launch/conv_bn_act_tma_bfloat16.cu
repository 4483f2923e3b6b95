#include "conv_bn_act_tma_launch.cuh"

int resnet_fused::launch_conv_bn_act_tma_bfloat16(const ConvTmaArguments& arguments, int index,
                                                  int32_t blocks, void* stream) {
  return launch_conv_bn_act_tma<BFloat16>(arguments, index, blocks, stream);
}
