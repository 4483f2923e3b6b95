// The launches of conv_bn_stats for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_stats_sm90.cuh"
#include "conv_bn_stats_tma.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape>
int start_conv_bn_stats_tma(const ConvStatsTmaArguments& arguments, int32_t blocks,
                            cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(blocks));
  if constexpr (Shape::kSharing > 1) {
    return RF_LAUNCH_CLUSTERS((conv_bn_stats_tma_kernel<T, Shape>), grid,
                              dim3(kWarpgroupBlockThreads), dim3(Shape::kSharing),
                              Shape::kSharedBytes, stream, arguments);
  } else {
    return RF_LAUNCH((conv_bn_stats_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                     Shape::kSharedBytes, stream, arguments);
  }
}

template <class T>
int launch_conv_bn_stats_tma(const ConvStatsTmaArguments& arguments, int index, int32_t blocks,
                             void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int error =
      clear_async(arguments.arrivals, static_cast<size_t>(arguments.cleared_bytes), to);
  if (error != cudaSuccess) return error;
  return StatsTmaTiles::with(index, [&]<class Shape>() -> int {
    if constexpr (Shape::kSharing == 1) {
      if (arguments.norm.scale != nullptr) {
        return start_conv_bn_stats_tma<T, TransformShape<Shape>>(arguments, blocks, to);
      }
    }
    return start_conv_bn_stats_tma<T, Shape>(arguments, blocks, to);
  });
}

}  // namespace resnet_fused
