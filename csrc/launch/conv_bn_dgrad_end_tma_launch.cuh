// The launches of conv_bn_dgrad_end for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_dgrad_end_sm90.cuh"
#include "conv_bn_dgrad_end_tma.h"
#include "conv_bn_dgrad_end_tma_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_dgrad_end_tma(const ConvBnDgradEndTmaArguments& arguments,
                                 const ClearedCounters& counters, int index, int32_t blocks,
                                 void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  if (counters.bytes > 0) {
    const int error = clear_async(counters.at, static_cast<size_t>(counters.bytes), to);
    if (error != cudaSuccess) return error;
  }
  return BnDgradEndTmaTiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(static_cast<uint32_t>(blocks));
    if constexpr (Shape::kSharing > 1) {
      return RF_LAUNCH_CLUSTERS((conv_bn_dgrad_end_tma_kernel<T, Shape>), grid,
                                dim3(kWarpgroupBlockThreads), dim3(Shape::kSharing),
                                Shape::kSharedBytes, to, arguments);
    } else {
      return RF_LAUNCH((conv_bn_dgrad_end_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                       Shape::kSharedBytes, to, arguments);
    }
  });
}

}  // namespace resnet_fused
