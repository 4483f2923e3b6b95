#include "../device/tf32_epilogue.h"
#include "conv_bn_act_tf32.h"
#include "conv_bn_act_tma_launch.cuh"

int resnet_fused::launch_conv_bn_act_tf32(const ConvTmaArguments& arguments, int index,
                                          int32_t blocks, void* stream) {
  return launch_conv_bn_act_tma<float, ConvTf32Tiles>(arguments, index, blocks, stream);
}
