// The launches of conv_wgrad for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_wgrad_sm90.cuh"
#include "conv_wgrad_merge.cuh"
#include "launch.h"
#include "wgrad_tma.h"
#include "wgrad_tma_grid.h"
#include "wgrad_tma_tiles.h"

namespace resnet_fused {

template <class T>
int launch_conv_wgrad_tma(const ConvWgradTmaArguments& arguments, int index, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return WgradTmaTiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(wgrad_tma_grid<Shape>(arguments.product.tiles));
    int error = 0;
    if constexpr (Shape::kSharing > 1) {
      error =
          RF_LAUNCH_CLUSTERS((conv_wgrad_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                             dim3(Shape::kSharing), Shape::kSharedBytes, cuda_stream, arguments);
    } else {
      error = RF_LAUNCH((conv_wgrad_tma_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                        Shape::kSharedBytes, cuda_stream, arguments);
    }
    return error != 0 ? error : launch_wgrad_merge<T, Shape>(arguments.product, cuda_stream);
  });
}

}  // namespace resnet_fused
