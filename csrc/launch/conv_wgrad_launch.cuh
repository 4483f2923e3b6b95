// The launches of conv_wgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_wgrad_sm80.cuh"
#include "conv_gradient_arguments.h"
#include "conv_gradient_tiles.h"
#include "conv_wgrad_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_wgrad(const ConvWgradArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto splits = static_cast<uint32_t>(arguments.tiles.splits);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    const dim3 grid(wgrad_tiles(arguments.tiles) * splits);
    const int error = RF_LAUNCH((conv_wgrad_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads),
                                Shape::kRingBytes, cuda_stream, arguments);
    if (error != 0 || splits == 1) return error;
    return launch_wgrad_merge<T, Shape>(arguments, cuda_stream);
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
