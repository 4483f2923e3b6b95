// The launches of conv_bn_dgrad_end for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_dgrad_end_sm80.cuh"
#include "conv_bn_dgrad_end_arguments.h"
#include "conv_bn_dgrad_end_tiles.h"
#include "conv_bn_dgrad_launch.cuh"

namespace resnet_fused {

template <class T>
int launch_conv_bn_dgrad_end(const ConvBnDgradEndArguments& arguments, int configuration,
                             void* stream) {
  const auto run = [&]<class Shape, LoadWidth kWidth>(dim3 grid, uint32_t shared,
                                                      cudaStream_t to) -> int {
    return RF_LAUNCH((conv_bn_dgrad_end_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads),
                     shared, to, arguments);
  };
  return launch_bn_dgrad_tiles<T, BnDgradEndWideTiles, BnDgradEndNarrowTiles>(
      arguments, configuration, stream, run);
}

}  // namespace resnet_fused
