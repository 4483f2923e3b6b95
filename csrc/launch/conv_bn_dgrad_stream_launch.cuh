// The launches of conv_bn_dgrad by windows beside a ring of filters for sm_90a, for one dtype; each
// dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_dgrad_stream_sm90.cuh"
#include "conv_bn_dgrad_stream_tiles.h"
#include "conv_bn_dgrad_window.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_dgrad_stream(const BnDgradWindowArguments& arguments,
                                const ClearedCounters& counters, int index, const WindowGrid& grid,
                                void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (counters.bytes > 0) {
    const int error = clear_async(counters.at, static_cast<size_t>(counters.bytes), to);
    if (error != cudaSuccess) return error;
  }
  return BnDgradStreamTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH((conv_bn_dgrad_stream_kernel<T, Shape>),
                     dim3(static_cast<uint32_t>(grid.blocks)), dim3(kWarpgroupBlockThreads),
                     static_cast<uint32_t>(grid.shared_bytes), to, arguments);
  });
}

}  // namespace resnet_fused
