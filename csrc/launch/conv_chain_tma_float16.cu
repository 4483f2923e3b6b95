#include "conv_chain_tma_launch.cuh"

int resnet_fused::launch_conv_chain_tma_float16(const ChainTmaArguments& arguments, int index,
                                                int32_t blocks, void* stream) {
  return launch_conv_chain_tma<Float16>(arguments, index, blocks, stream);
}
