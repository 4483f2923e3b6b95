// The launches of conv_dgrad for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_dgrad_sm90.cuh"
#include "conv_dgrad_tma.h"
#include "conv_dgrad_tma_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_dgrad_tma(const ConvDgradTmaArguments& arguments, int index, int32_t blocks,
                          void* stream) {
  return DgradTmaTiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(static_cast<uint32_t>(blocks));
    const auto to = static_cast<cudaStream_t>(stream);
    if constexpr (Shape::kSharing > 1) {
      return RF_LAUNCH_CLUSTERS((conv_dgrad_tma_kernel<T, Shape>), grid,
                                dim3(kWarpgroupBlockThreads), dim3(Shape::kSharing),
                                Shape::kSharedBytes, to, arguments);
    } else {
      return RF_LAUNCH((conv_dgrad_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                       Shape::kSharedBytes, to, arguments);
    }
  });
}

}  // namespace resnet_fused
