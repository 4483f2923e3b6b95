// The launches of conv_bn_wgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_wgrad_sm80.cuh"
#include "conv_bn_wgrad_arguments.h"
#include "conv_bn_wgrad_tiles.h"
#include "conv_wgrad_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_wgrad(const ConvBnWgradArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    const ConvWgradArguments& product = arguments.product;
    const dim3 grid(wgrad_tiles(product.tiles) * static_cast<uint32_t>(product.tiles.splits));
    const int error = RF_LAUNCH((conv_bn_wgrad_kernel<T, Shape, kWidth>), grid,
                                dim3(Shape::kThreads), Shape::kRingBytes, cuda_stream, arguments);
    if (error != 0) return error;
    return arguments.float_dweight ? launch_wgrad_merge<float, Shape>(product, cuda_stream)
                                   : launch_wgrad_merge<T, Shape>(product, cuda_stream);
  };
  if (configuration < BnWgradWideTiles::kSize) {
    return BnWgradWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  return BnWgradNarrowTiles::with(configuration - BnWgradWideTiles::kSize, [&]<class Shape>() {
    return start.template operator()<Shape, LoadWidth::kNarrow>();
  });
}

}  // namespace resnet_fused
