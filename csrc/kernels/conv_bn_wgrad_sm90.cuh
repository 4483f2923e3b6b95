// conv_bn_wgrad on the GPU, for sm_90a: the gradient of a convolution's weights behind a BatchNorm
// whose backward is made as its operand arrives, by wgmma, fed by TMA. x is read as it lies.
//
//     dweight[k, e] = sum over m of dy[m, k] * x[m, e],  dy = a dz + (b y + c)
//
// conv_wgrad's kernel for sm_90a with another left operand.
#pragma once

#include "../device/affine_channels.h"
#include "conv_wgrad_sm90.cuh"

namespace resnet_fused {

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_wgrad_tma_kernel(const __grid_constant__ ConvBnWgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const WgradProduct& product = arguments.wgrad.product;
  run_wgrad<T, Shape>(
      arguments.wgrad, [&](const Tile& tile, const WgradPart& part, uint32_t row, uint32_t thread) {
        const auto first = tile.m * Shape::kM + static_cast<int32_t>(row);
        const float* coefficients = arguments.coefficients;
        if (coefficients != nullptr) coefficients += tile.group * product.channels_out + first;
        return AffineChannels<T>(coefficients, arguments.filters, product.channels_out - first,
                                 arguments.wgrad.grid.pixels - part.first_pixel, thread);
      });
#endif
}

}  // namespace resnet_fused
