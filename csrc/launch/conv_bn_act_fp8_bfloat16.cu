#include "conv_bn_act_fp8_launch.cuh"
#include "conv_bn_act_window_launch.cuh"

int resnet_fused::launch_conv_bn_act_fp8_bfloat16(const ConvTmaArguments& arguments, int index,
                                                  int32_t blocks, void* stream) {
  return launch_conv_bn_act_fp8<BFloat16>(arguments, index, blocks, stream);
}

int resnet_fused::launch_conv_bn_act_fp8_window_bfloat16(const ConvWindowArguments& arguments,
                                                         int index, const WindowGrid& grid,
                                                         void* stream) {
  return launch_conv_bn_act_window<E4M3To<BFloat16>, ConvFp8WindowTiles>(arguments, index, grid,
                                                                         stream);
}
