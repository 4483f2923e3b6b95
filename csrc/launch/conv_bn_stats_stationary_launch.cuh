// The launches of conv_bn_stats with filters that stay for sm_90a, for one dtype; each dtype's .cu
// file makes its own.
#pragma once

#include "../kernels/conv_bn_stats_stationary_sm90.cuh"
#include "conv_bn_stats_stationary.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape>
int start_conv_bn_stats_stationary(const ConvStatsTmaArguments& arguments, int32_t blocks,
                                   cudaStream_t stream) {
  return RF_LAUNCH((conv_bn_stats_stationary_kernel<T, Shape>), dim3(static_cast<uint32_t>(blocks)),
                   dim3(kWarpgroupBlockThreads), Shape::kSharedBytes, stream, arguments);
}

template <class T>
int launch_conv_bn_stats_stationary(const ConvStatsTmaArguments& arguments, int index,
                                    int32_t blocks, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int error =
      clear_async(arguments.arrivals, static_cast<size_t>(arguments.cleared_bytes), to);
  if (error != cudaSuccess) return error;
  return StatsStationaryTiles::with(index, [&]<class Shape>() -> int {
    return arguments.norm.scale == nullptr
               ? start_conv_bn_stats_stationary<T, Shape>(arguments, blocks, to)
               : start_conv_bn_stats_stationary<T, TransformShape<Shape>>(arguments, blocks, to);
  });
}

}  // namespace resnet_fused
