// The launches of conv_bn_stats by windows beside a ring of filters for sm_90a, for one dtype; each
// dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_stats_stream_sm90.cuh"
#include "conv_bn_stats_window.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape>
int start_conv_bn_stats_stream(const ConvStatsWindowArguments& arguments, const WindowGrid& grid,
                               cudaStream_t stream) {
  return RF_LAUNCH((conv_bn_stats_stream_kernel<T, Shape>),
                   dim3(static_cast<uint32_t>(grid.blocks)), dim3(kWarpgroupBlockThreads),
                   static_cast<uint32_t>(grid.shared_bytes), stream, arguments);
}

template <class T>
int launch_conv_bn_stats_stream(const ConvStatsWindowArguments& arguments, int index,
                                const WindowGrid& grid, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int error =
      clear_async(arguments.arrivals, static_cast<size_t>(arguments.cleared_bytes), to);
  if (error != cudaSuccess) return error;
  return StatsStreamTiles::with(index, [&]<class Shape>() -> int {
    return arguments.norm.scale == nullptr
               ? start_conv_bn_stats_stream<T, Shape>(arguments, grid, to)
               : start_conv_bn_stats_stream<T, TransformShape<Shape>>(arguments, grid, to);
  });
}

}  // namespace resnet_fused
