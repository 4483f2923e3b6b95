#include "conv_bn_act_window_launch.cuh"

int resnet_fused::launch_conv_bn_act_window_bfloat16(const ConvWindowArguments& arguments,
                                                     int index, const WindowGrid& grid,
                                                     void* stream) {
  return launch_conv_bn_act_window<BFloat16, ConvWindowTiles>(arguments, index, grid, stream);
}
