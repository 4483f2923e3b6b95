#include "conv_bn_act_window_launch.cuh"

int resnet_fused::launch_conv_bn_act_window_float16(const ConvWindowArguments& arguments, int index,
                                                    const WindowGrid& grid, void* stream) {
  return launch_conv_bn_act_window<Float16, ConvWindowTiles>(arguments, index, grid, stream);
}
