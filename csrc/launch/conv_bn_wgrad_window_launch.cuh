// The launches of conv_bn_wgrad's window kernel for sm_90a, for one dtype; each dtype's .cu file
// makes its own.
#pragma once

#include "../kernels/conv_bn_wgrad_window_sm90.cuh"
#include "conv_bn_wgrad_window.h"
#include "conv_wgrad_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_wgrad_window(const BnWgradWindowArguments& arguments, int index,
                                int32_t shared_bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const WgradProduct& product = arguments.product;
  return WgradWindowTiles::with(index, [&]<class Shape>() -> int {
    const dim3 grid(wgrad_tiles(product.tiles) * static_cast<uint32_t>(product.tiles.splits));
    const int error =
        RF_LAUNCH((conv_bn_wgrad_window_kernel<T, Shape>), grid, dim3(kWarpgroupBlockThreads),
                  static_cast<uint32_t>(shared_bytes), cuda_stream, arguments);
    if (error != 0) return error;
    return arguments.float_dweight ? launch_wgrad_merge<float, Shape>(product, cuda_stream)
                                   : launch_wgrad_merge<T, Shape>(product, cuda_stream);
  });
}

}  // namespace resnet_fused
