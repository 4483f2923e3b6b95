// The launches of conv_bn_wgrad for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_wgrad_image_sm80.cuh"
#include "../kernels/conv_bn_wgrad_sm80.cuh"
#include "conv_bn_wgrad_arguments.h"
#include "conv_bn_wgrad_tiles.h"
#include "conv_wgrad_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_wgrad(const ConvBnWgradArguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const ConvWgradArguments& product = arguments.product;
  const dim3 grid(wgrad_tiles(product.tiles) * static_cast<uint32_t>(product.tiles.splits));
  const auto merge = [&]<class Shape>(int error) {
    if (error != 0) return error;
    return arguments.float_dweight ? launch_wgrad_merge<float, Shape>(product, cuda_stream)
                                   : launch_wgrad_merge<T, Shape>(product, cuda_stream);
  };
  const auto start = [&]<class Shape, LoadWidth kWidth>() -> int {
    if constexpr (sizeof(T) == 4 && kWindowsOf<Shape> > 0) {
      return cudaErrorInvalidValue;  // no plan gives it to float
    } else {
      int64_t bytes = Shape::kRingBytes;
      if constexpr (kWindowsOf<Shape> > 0) bytes += halo_ring_bytes(Shape::kStages, product.width);
      return merge.template operator()<Shape>(
          RF_LAUNCH((conv_bn_wgrad_kernel<T, Shape, kWidth>), grid, dim3(Shape::kThreads),
                    static_cast<uint32_t>(bytes), cuda_stream, arguments));
    }
  };
  if (configuration < BnWgradWideTiles::kSize) {
    return BnWgradWideTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kWide>();
    });
  }
  configuration -= BnWgradWideTiles::kSize;
  if (configuration < BnWgradNarrowTiles::kSize) {
    return BnWgradNarrowTiles::with(configuration, [&]<class Shape>() {
      return start.template operator()<Shape, LoadWidth::kNarrow>();
    });
  }
  if constexpr (sizeof(T) == 2) {
    return BnWgradImageTiles::with(
        configuration - BnWgradNarrowTiles::kSize, [&]<class Shape>() -> int {
          return merge.template operator()<Shape>(
              RF_LAUNCH((conv_bn_wgrad_image_kernel<T, Shape>), grid, dim3(Shape::kThreads),
                        Shape::kRingBytes, cuda_stream, arguments));
        });
  }
  return cudaErrorInvalidValue;  // no plan gives it to float
}

}  // namespace resnet_fused
