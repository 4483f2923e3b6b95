// The launches of bn_add_act_conv_stats for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/bn_add_act_conv_stats_sm80.cuh"
#include "bn_add_act_conv_stats_arguments.h"
#include "bn_add_act_conv_stats_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape, bool kProjected>
int start_bn_add_act_conv_stats(const BlockEndArguments& arguments, cudaStream_t stream) {
  const TileGrid& tiles = arguments.stats.tiles;
  const dim3 grid(static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                  static_cast<uint32_t>(tiles.splits));
  return RF_LAUNCH((bn_add_act_conv_stats_kernel<T, Shape, kProjected>), grid,
                   dim3(Shape::kThreads), kStatsSharedBytes<Shape>, stream, arguments);
}

template <class T>
int launch_bn_add_act_conv_stats(const BlockEndArguments& arguments, int configuration,
                                 void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const ConvBnStatsArguments& stats = arguments.stats;
  if (stats.cleared_bytes > 0) {
    const int error =
        clear_async(stats.counters, static_cast<size_t>(stats.cleared_bytes), cuda_stream);
    if (error != cudaSuccess) return error;
  }
  return BlockEndTiles::with(configuration, [&]<class Shape>() -> int {
    if constexpr (kOutputFits<T, Shape>) {
      if (arguments.shortcut_scale == nullptr) {
        return start_bn_add_act_conv_stats<T, Shape, false>(arguments, cuda_stream);
      }
      if constexpr (Shape::kN <= kBlockEndProjectedColumns) {
        return start_bn_add_act_conv_stats<T, Shape, true>(arguments, cuda_stream);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace resnet_fused
