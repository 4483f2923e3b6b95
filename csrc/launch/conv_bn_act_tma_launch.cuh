// The launches of conv_bn_act for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_act_sm90.cuh"
#include "conv_bn_act_tma.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Tiles = ConvTmaTiles>
int launch_conv_bn_act_tma(const ConvTmaArguments& arguments, int index, int32_t blocks,
                           void* stream) {
  return Tiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(static_cast<uint32_t>(blocks));
    const auto to = static_cast<cudaStream_t>(stream);
    if constexpr (Shape::kSharing > 1) {
      return RF_LAUNCH_CLUSTERS_EARLY(arguments.follows, (conv_bn_act_tma_kernel<T, Shape>), grid,
                                      dim3(kWarpgroupBlockThreads), dim3(Shape::kSharing),
                                      Shape::kSharedBytes, to, arguments);
    } else {
      return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_tma_kernel<T, Shape>), grid,
                             dim3(kWarpgroupBlockThreads), Shape::kSharedBytes, to, arguments);
    }
  });
}

}  // namespace resnet_fused
