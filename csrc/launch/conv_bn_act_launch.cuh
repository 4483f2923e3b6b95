// The launches of conv_bn_act for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_act_sm80.cuh"
#include "conv_bn_act_arguments.h"
#include "conv_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_act(const ConvBnActArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const TileGrid& tiles = arguments.tiles;
  const auto count = static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
                     static_cast<uint32_t>(tiles.groups);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    if constexpr (kOutputFits<T, Shape>) {
      const dim3 grid(count * static_cast<uint32_t>(tiles.splits));
      return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_kernel<T, Shape, kWidth>), grid,
                             dim3(Shape::kThreads), Shape::kRingBytes, cuda_stream, arguments);
    } else {
      return cudaErrorInvalidConfiguration;  // the plan refuses it
    }
  };
  if (tiles.splits > 1 && !arguments.workspace.zero) {
    const int error =
        clear_async(arguments.workspace.arrivals, count * sizeof(uint32_t), cuda_stream);
    if (error != cudaSuccess) return error;
  }
  if (configuration < ConvWideTiles::kSize) {
    return ConvWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  return ConvNarrowTiles::with(configuration - ConvWideTiles::kSize, [&]<class Shape>() {
    return start.template operator()<Shape, LoadWidth::kNarrow>();
  });
}

}  // namespace resnet_fused
