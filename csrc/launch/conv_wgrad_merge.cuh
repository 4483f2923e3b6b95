// The launch that adds the parts of a weight's gradient, for conv_wgrad and conv_bn_wgrad, whatever
// has multiplied them.
#pragma once

#include "../kernels/conv_wgrad_merge_sm80.cuh"
#include "launch.h"

namespace resnet_fused {

inline uint32_t wgrad_tiles(const TileGrid& tiles) {
  return static_cast<uint32_t>(tiles.tiles_m) * static_cast<uint32_t>(tiles.tiles_n) *
         static_cast<uint32_t>(tiles.groups);
}

// T: of the result.
template <class T, class Shape>
int launch_wgrad_merge(const WgradProduct& product, cudaStream_t stream) {
  const WgradTile shape{Shape::kM,     Shape::kN,     Shape::kWarpsM,
                        Shape::kWarpM, Shape::kWarpN, Shape::kThreads / 32};
  const dim3 grid(wgrad_tiles(product.tiles) * (Shape::kM * Shape::kN / (4 * 32)));
  return RF_LAUNCH(conv_wgrad_merge_kernel<T>, grid, dim3(32 * kWgradMergeWarps),
                   32 * kWgradMergeWarps * kVectorBytes, stream, product, shape);
}

}  // namespace resnet_fused
