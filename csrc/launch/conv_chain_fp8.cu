// The launch of conv_chain_fp8.
#include "../device/quantised_chain.h"
#include "conv_chain_fp8_tiles.h"
#include "conv_chain_tma_launch.cuh"

int resnet_fused::launch_conv_chain_fp8(const ChainTmaArguments& arguments, int index,
                                        int32_t blocks, void* stream) {
  return launch_conv_chain_tma<Float8E4M3, ConvChainFp8Tiles>(arguments, index, blocks, stream);
}
