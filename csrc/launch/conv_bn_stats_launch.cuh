// The launches of conv_bn_stats for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_stats_image_sm80.cuh"
#include "../kernels/conv_bn_stats_sm80.cuh"
#include "conv_bn_stats_arguments.h"
#include "conv_bn_stats_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth, StatsSource kSource>
int start_conv_bn_stats(const ConvBnStatsArguments& arguments, cudaStream_t stream) {
  const TileGrid& tiles = arguments.tiles;
  const dim3 grid(static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                  static_cast<uint32_t>(tiles.groups) * static_cast<uint32_t>(tiles.splits));
  const int64_t windows =
      kSource == StatsSource::kHalo
          ? halo_bytes(Shape::kM, arguments.operands.image.width, kWindowsOf<Shape>)
          : 0;
  return RF_LAUNCH((conv_bn_stats_kernel<T, Shape, kWidth, kSource>), grid, dim3(Shape::kThreads),
                   kStatsSharedBytes<Shape> + static_cast<uint32_t>(windows), stream, arguments);
}

template <class T, class Shape>
int start_conv_bn_stats_image(const ConvBnStatsArguments& arguments, cudaStream_t stream) {
  const ConvOperands& operands = arguments.operands;
  const auto width = static_cast<int32_t>(operands.grid.columns.value);
  const auto chunks = static_cast<int32_t>(image_window_chunks(Shape::kM, width));
  const int64_t bytes = image_block_bytes(Shape::kFiltersBytes, kStatsSharedBytes<Shape>,
                                          operands.reduction.taps_r, chunks);
  const ImageStatsArguments made{arguments, make_divisor(width + kImageGap), chunks};
  return RF_LAUNCH((conv_bn_stats_image_kernel<T, Shape>),
                   dim3(static_cast<uint32_t>(arguments.walkers * arguments.tiles.tiles_n)),
                   dim3(Shape::kThreads), static_cast<uint32_t>(bytes), stream, made);
}

template <class T>
int launch_conv_bn_stats(const ConvBnStatsArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    return arguments.scale == nullptr
               ? start_conv_bn_stats<T, Shape, kWidth, StatsSource::kPlain>(arguments, cuda_stream)
               : start_conv_bn_stats<T, Shape, kWidth, StatsSource::kNormed>(arguments,
                                                                             cuda_stream);
  };
  if (arguments.cleared_bytes > 0) {
    const int error =
        clear_async(arguments.counters, static_cast<size_t>(arguments.cleared_bytes), cuda_stream);
    if (error != cudaSuccess) return error;
  }
  if (configuration < kFirstNarrowStats) {
    return StatsWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  if (configuration < kFirstHaloStats) {
    return StatsNarrowTiles::with(configuration - kFirstNarrowStats, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kNarrow>();
    });
  }
  if (configuration < kFirstImageStats) {
    return StatsHaloTiles::with(configuration - kFirstHaloStats, [&]<class Shape>() -> int {
      if constexpr (kOutputFits<T, Shape>) {
        return start_conv_bn_stats<T, Shape, LoadWidth::kWide, StatsSource::kHalo>(arguments,
                                                                                   cuda_stream);
      } else {
        return cudaErrorInvalidValue;
      }
    });
  }
  if constexpr (sizeof(T) == 2) {
    return StatsImageTiles::with(configuration - kFirstImageStats, [&]<class Shape>() {
      return start_conv_bn_stats_image<T, Shape>(arguments, cuda_stream);
    });
  }
  return cudaErrorInvalidValue;  // no plan gives it to float
}

}  // namespace resnet_fused
