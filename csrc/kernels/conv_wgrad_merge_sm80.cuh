// The second kernel of a weight's gradient, for sm_80 and later: adds the sums that the parts of
// the first one have left, in a fixed order.
#pragma once

#include <cstdint>

#include "../device/wgrad_parts.h"

namespace resnet_fused {

// The shape of the tiles whose parts are added: what the kernel above knows at compile time.
struct WgradTile {
  int32_t m;
  int32_t n;
  int32_t warps_m;
  int32_t warp_m;
  int32_t warp_n;
  int32_t warps;
};

constexpr int kWgradMergeWarps = 8;

// Adds the splits' sums. A block does the vectors that the 32 lanes of one warp have left in one
// place: its warps share the splits, one in kWgradMergeWarps each, and warp 0 adds their eight
// sums.
template <class T>
__global__ void __launch_bounds__(32 * kWgradMergeWarps)
    conv_wgrad_merge_kernel(const __grid_constant__ WgradProduct product, const WgradTile shape) {
  const ptx::SharedAddress sums = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t part = threadIdx.x / 32;
  const auto columns = static_cast<uint32_t>(shape.warp_n / 8);
  const auto vectors = static_cast<uint32_t>(shape.warp_m / 16) * columns;
  const uint32_t warp = blockIdx.x % shape.warps;
  const uint32_t vector = blockIdx.x / shape.warps % vectors;
  const uint32_t index = blockIdx.x / shape.warps / vectors;
  const int splits = product.tiles.splits;

  const int64_t stride = static_cast<int64_t>(vectors) * shape.warps * 32;  // of splits
  const auto* from = reinterpret_cast<const Vector<float>*>(product.partial) +
                     index * splits * stride + (vector * shape.warps + warp) * 32 + lane;
  Vector<float> sum{};
#pragma unroll 4
  for (int split = static_cast<int>(part); split < splits; split += kWgradMergeWarps) {
    const Vector<float> value = ptx::load_global(from + split * stride);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.lane[e] += value.lane[e];
  }
  ptx::store_shared(sums + threadIdx.x * kVectorBytes, sum);
  ptx::sync_threads();
  if (part != 0) return;
#pragma unroll
  for (int other = 1; other < kWgradMergeWarps; ++other) {
    const auto value = ptx::load_shared<Vector<float>>(sums + (other * 32 + lane) * kVectorBytes);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.lane[e] += value.lane[e];
  }

  const Tile tile = tile_of(index * static_cast<uint32_t>(splits), product.tiles);
  const auto warp_row = static_cast<int32_t>(warp % shape.warps_m) * shape.warp_m;
  const auto warp_column = static_cast<int32_t>(warp / shape.warps_m) * shape.warp_n;
  const int32_t row0 =
      tile.m * shape.m + warp_row + static_cast<int32_t>(vector / columns * 16 + lane / 4);
  const int32_t column0 =
      tile.n * shape.n + warp_column + static_cast<int32_t>(vector % columns * 8 + lane % 4 * 2);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int32_t row = row0 + e / 2 * 8;
    T* to = dweight_at<T>(product, tile.group, row, column0 + e % 2);
    if (to == nullptr) continue;
    ptx::store_global(to, narrow<T>(sum.lane[e] * scale_of(product, tile.group, row)));
  }
}

}  // namespace resnet_fused
