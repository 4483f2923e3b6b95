// The launches of conv_chain for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_chain_sm80.cuh"
#include "conv_chain_arguments.h"
#include "conv_chain_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_chain(const ConvChainArguments& arguments, int configuration, void* stream) {
  return ConvChainTiles::with(configuration, [&]<class Shape>() -> int {
    const auto tiles = static_cast<uint32_t>(divide_up(arguments.grid.pixels, Shape::kM));
    return RF_LAUNCH_EARLY(arguments.follows, (conv_chain_kernel<T, Shape>), dim3(tiles),
                           dim3(Shape::kThreads), static_cast<uint32_t>(arguments.memory.bytes),
                           static_cast<cudaStream_t>(stream), arguments);
  });
}

}  // namespace resnet_fused
