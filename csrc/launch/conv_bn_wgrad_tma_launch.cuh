// The launches of conv_bn_wgrad for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_wgrad_sm90.cuh"
#include "conv_bn_wgrad_arguments.h"
#include "conv_wgrad_merge.cuh"
#include "launch.h"
#include "wgrad_tma_grid.h"
#include "wgrad_tma_tiles.h"

namespace resnet_fused {

template <class T, class Shape>
int start_conv_bn_wgrad_tma(const ConvBnWgradTmaArguments& arguments, cudaStream_t stream) {
  const dim3 grid(wgrad_tma_grid<Shape>(arguments.wgrad.product.tiles));
  if constexpr (Shape::kSharing > 1) {
    return RF_LAUNCH_CLUSTERS((conv_bn_wgrad_tma_kernel<T, Shape>), grid,
                              dim3(kWarpgroupBlockThreads), dim3(Shape::kSharing),
                              Shape::kSharedBytes, stream, arguments);
  } else {
    return RF_LAUNCH((conv_bn_wgrad_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                     Shape::kSharedBytes, stream, arguments);
  }
}

// Of x behind a BatchNorm. No plan gives that to blocks that share x.
template <class T, class Shape>
int start_normed_conv_bn_wgrad_tma(const ConvBnWgradTmaArguments& arguments, cudaStream_t stream) {
  if constexpr (Shape::kSharing > 1) {
    return cudaErrorInvalidValue;
  } else {
    return start_conv_bn_wgrad_tma<T, TransformShape<Shape>>(arguments, stream);
  }
}

template <class T>
int launch_conv_bn_wgrad_tma(const ConvBnWgradTmaArguments& arguments, int index, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const WgradProduct& product = arguments.wgrad.product;
  return WgradTmaTiles::with(index, [&]<class Shape>() -> int {
    const int error = arguments.norm.scale != nullptr
                          ? start_normed_conv_bn_wgrad_tma<T, Shape>(arguments, cuda_stream)
                          : start_conv_bn_wgrad_tma<T, Shape>(arguments, cuda_stream);
    if (error != 0) return error;
    return arguments.float_dweight ? launch_wgrad_merge<float, Shape>(product, cuda_stream)
                                   : launch_wgrad_merge<T, Shape>(product, cuda_stream);
  });
}

}  // namespace resnet_fused
