// The launches of conv_bn_dgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_dgrad_sm80.cuh"
#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_tiles.h"
#include "launch.h"

namespace resnet_fused {

// The launch of a kernel of such tiles. run: of <Shape, LoadWidth>, with the grid, a block's bytes
// and the stream.
template <class T, class WideTiles, class NarrowTiles, class Run>
int launch_bn_dgrad_tiles(const ConvBnDgradArguments& arguments, int configuration, void* stream,
                          const Run& run) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const TileGrid& tiles = arguments.conv.tiles;
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    if constexpr (sizeof(T) == 4 && Shape::kN > kBnDgradFloatColumns) {
      return cudaErrorInvalidConfiguration;  // no plan says so
    } else {
      const dim3 grid(static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                      static_cast<uint32_t>(tiles.groups) * static_cast<uint32_t>(tiles.splits));
      const int64_t shared = kWindowsOf<Shape> == 0
                                 ? Shape::kRingBytes
                                 : halo_staged_bytes(Shape::kRingBytes, Shape::kM, Shape::kN,
                                                     arguments.conv.w.size, kWindowsOf<Shape>);
      return run.template operator()<Shape, kWidth>(grid, static_cast<uint32_t>(shared),
                                                    cuda_stream);
    }
  };
  if (arguments.cleared_bytes > 0) {
    const int error =
        clear_async(arguments.counters, static_cast<size_t>(arguments.cleared_bytes), cuda_stream);
    if (error != cudaSuccess) return error;
  }
  if (configuration < WideTiles::kSize) {
    return WideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  return NarrowTiles::with(configuration - WideTiles::kSize, [&]<class Shape>() {
    return start.template operator()<Shape, LoadWidth::kNarrow>();
  });
}

template <class T>
int launch_conv_bn_dgrad(const ConvBnDgradArguments& arguments, int configuration, void* stream) {
  const auto run = [&]<class Shape, LoadWidth kWidth>(dim3 grid, uint32_t shared,
                                                      cudaStream_t to) -> int {
    return RF_LAUNCH((conv_bn_dgrad_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads), shared,
                     to, arguments);
  };
  return launch_bn_dgrad_tiles<T, BnDgradWideTiles, BnDgradNarrowTiles>(arguments, configuration,
                                                                        stream, run);
}

}  // namespace resnet_fused
