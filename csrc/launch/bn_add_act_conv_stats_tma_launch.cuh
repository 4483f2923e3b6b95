// The launches of bn_add_act_conv_stats for sm_90a, for one dtype; each dtype's .cu file makes its
// own.
#pragma once

#include "../kernels/bn_add_act_conv_stats_sm90.cuh"
#include "bn_add_act_conv_stats_tma.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape, bool kProjected>
int start_bn_add_act_conv_stats_tma(const BlockEndTmaArguments& arguments, int32_t blocks,
                                    cudaStream_t stream) {
  return RF_LAUNCH((bn_add_act_conv_stats_tma_kernel<T, Shape, kProjected>),
                   dim3(static_cast<uint32_t>(blocks)), dim3(kWarpgroupBlockThreads),
                   Shape::kSharedBytes, stream, arguments);
}

template <class T>
int launch_bn_add_act_conv_stats_tma(const BlockEndTmaArguments& arguments, int index,
                                     int32_t blocks, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const ConvStatsTmaArguments& stats = arguments.stats;
  const int error = clear_async(stats.arrivals, static_cast<size_t>(stats.cleared_bytes), to);
  if (error != cudaSuccess) return error;
  return BlockEndTmaTiles::with(index, [&]<class Tile>() -> int {
    using Shape = TransformShape<Tile>;
    return arguments.shortcut_scale == nullptr
               ? start_bn_add_act_conv_stats_tma<T, Shape, false>(arguments, blocks, to)
               : start_bn_add_act_conv_stats_tma<T, Shape, true>(arguments, blocks, to);
  });
}

}  // namespace resnet_fused
