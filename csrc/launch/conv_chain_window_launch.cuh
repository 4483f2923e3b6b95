// The launches of conv_chain for sm_90a with a 3x3 convolution in front, for one dtype; each
// dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_chain_stream_sm90.cuh"
#include "../kernels/conv_chain_window_sm90.cuh"
#include "conv_chain_window.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_chain_window(const ChainWindowArguments& arguments, int index, int32_t blocks,
                             int32_t shared_bytes, void* stream) {
  return ConvChainWindowTiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(static_cast<uint32_t>(blocks));
    const dim3 block(kWarpgroupBlockThreads);
    const auto bytes = static_cast<uint32_t>(shared_bytes);
    const auto to = static_cast<cudaStream_t>(stream);
    if constexpr (Shape::kSharing > 1) {
      return RF_LAUNCH_CLUSTERS_EARLY(arguments.follows, (conv_chain_stream_kernel<T, Shape>), grid,
                                      block, dim3(Shape::kSharing), bytes, to, arguments);
    } else {
      return RF_LAUNCH_EARLY(arguments.follows, (conv_chain_window_kernel<T, Shape>), grid, block,
                             bytes, to, arguments);
    }
  });
}

}  // namespace resnet_fused
