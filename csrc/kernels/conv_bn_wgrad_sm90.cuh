// conv_bn_wgrad on the GPU, for sm_90a: the gradient of a convolution's weights between two
// BatchNorms, by wgmma, fed by TMA.
//
//     dweight[k, e] = sum over m of dy[m, k] * h[m, e],  dy = a dz + (b y + c)
//
// conv_wgrad's kernel for sm_90a with another left operand, made as it arrives. Of x as it lies, or
// of h = relu(scale * x + shift), which the producer's other warps put in the place of x's boxes.
#pragma once

#include "../device/affine_channels.h"
#include "../device/normed_columns.h"
#include "conv_wgrad_sm90.cuh"

namespace resnet_fused {

// For any other architecture it is empty, and no plan chooses it. Shape: a WgradTmaShape, or a
// TransformShape of one where a norm is read through.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_wgrad_tma_kernel(const __grid_constant__ ConvBnWgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const WgradProduct& product = arguments.wgrad.product;
  const auto make_left = [&](const Tile& tile, const WgradPart& part, uint32_t row,
                             uint32_t thread) {
    const auto first = tile.m * Shape::kM + static_cast<int32_t>(row);
    const float* coefficients = arguments.coefficients;
    if (coefficients != nullptr) coefficients += tile.group * product.channels_out + first;
    return AffineChannels<T>(coefficients, arguments.filters, product.channels_out - first,
                             arguments.wgrad.grid.pixels - part.first_pixel, thread);
  };
  if constexpr (Shape::kTransforms) {
    run_wgrad<T, Shape>(
        arguments.wgrad, make_left,
        [&](const RingOf<Shape>& ring, ptx::SharedAddress shared, const Tile& tile,
            const WgradPart& part, uint32_t thread) {
          transform_stages<Shape>(
              ring, shared,
              NormedColumns<T, Shape>(arguments.wgrad, arguments.norm, tile, part, thread));
        });
  } else {
    run_wgrad<T, Shape>(arguments.wgrad, make_left);
  }
#endif
}

}  // namespace resnet_fused
