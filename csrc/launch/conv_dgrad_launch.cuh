// The launches of conv_dgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_dgrad_sm80.cuh"
#include "conv_gradient_arguments.h"
#include "conv_gradient_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_dgrad(const ConvDgradArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const TileGrid& tiles = arguments.tiles;
  const auto count = static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                     static_cast<uint32_t>(tiles.groups);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    const dim3 grid(count * static_cast<uint32_t>(tiles.splits));
    return RF_LAUNCH((conv_dgrad_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads),
                     Shape::kRingBytes, cuda_stream, arguments);
  };
  if (tiles.splits > 1) {
    const int error =
        clear_async(arguments.workspace.arrivals, count * sizeof(uint32_t), cuda_stream);
    if (error != cudaSuccess) return error;
  }
  if (configuration < DgradWideTiles::kSize) {
    return DgradWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  return DgradNarrowTiles::with(configuration - DgradWideTiles::kSize, [&]<class Shape>() {
    return start.template operator()<Shape, LoadWidth::kNarrow>();
  });
}

}  // namespace resnet_fused
