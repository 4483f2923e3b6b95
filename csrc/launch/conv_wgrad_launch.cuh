// The launches of conv_wgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_wgrad_sm80.cuh"
#include "conv_gradient_arguments.h"
#include "conv_gradient_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_wgrad(const ConvWgradArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const TileGrid& tiles = arguments.tiles;
  const auto count = static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                     static_cast<uint32_t>(tiles.groups);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    const dim3 grid(count * static_cast<uint32_t>(tiles.splits));
    const int error = RF_LAUNCH((conv_wgrad_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads),
                                Shape::kRingBytes, cuda_stream, arguments);
    if (error != 0 || tiles.splits == 1) return error;
    const WgradTile shape{Shape::kM,     Shape::kN,     Shape::kWarpsM,
                          Shape::kWarpM, Shape::kWarpN, Shape::kThreads / 32};
    const dim3 merging(count * (Shape::kM * Shape::kN / (4 * 32)));
    return RF_LAUNCH(conv_wgrad_merge_kernel<T>, merging, dim3(32 * kWgradMergeWarps),
                     32 * kWgradMergeWarps * kVectorBytes, cuda_stream, arguments, shape);
  };
  if (configuration < WgradWideTiles::kSize) {
    return WgradWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  return WgradNarrowTiles::with(configuration - WgradWideTiles::kSize, [&]<class Shape>() {
    return start.template operator()<Shape, LoadWidth::kNarrow>();
  });
}

}  // namespace resnet_fused
