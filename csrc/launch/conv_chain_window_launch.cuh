// The launches of conv_chain for sm_90a with a 3x3 convolution in front, for one dtype; each
// dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_chain_window_sm90.cuh"
#include "conv_chain_window.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_chain_window(const ChainWindowArguments& arguments, int index, int32_t blocks,
                             int32_t shared_bytes, void* stream) {
  return ConvChainWindowTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (conv_chain_window_kernel<T, Shape>),
                           dim3(static_cast<uint32_t>(blocks)), dim3(kWarpgroupBlockThreads),
                           static_cast<uint32_t>(shared_bytes), static_cast<cudaStream_t>(stream),
                           arguments);
  });
}

}  // namespace resnet_fused
