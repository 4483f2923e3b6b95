// The launches of conv_bn_stats of a stem for sm_90a, for one dtype; each dtype's .cu file makes
// its own.
#pragma once

#include "../kernels/conv_bn_stats_stem_sm90.cuh"
#include "conv_bn_stats_stem.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_stats_stem(const ConvStatsStemArguments& arguments, int index, int32_t blocks,
                              void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const int error =
      clear_async(arguments.arrivals, static_cast<size_t>(arguments.cleared_bytes), to);
  if (error != cudaSuccess) return error;
  const auto columns =
      static_cast<uint32_t>((arguments.filters() + kStemFilters - 1) / kStemFilters);
  return StatsStemTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH((conv_bn_stats_stem_rows_kernel<T, Shape>),
                     dim3(static_cast<uint32_t>(blocks), columns), dim3(Shape::kThreads),
                     Shape::kSharedBytes, to, arguments);
  });
}

}  // namespace resnet_fused
