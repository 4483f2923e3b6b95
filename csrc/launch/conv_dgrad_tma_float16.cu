#include "conv_dgrad_tma_launch.cuh"

int resnet_fused::launch_conv_dgrad_tma_float16(const ConvDgradTmaArguments& arguments, int index,
                                                int32_t blocks, void* stream) {
  return launch_conv_dgrad_tma<Float16>(arguments, index, blocks, stream);
}
