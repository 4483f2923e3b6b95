// The tiles of the convolutions' kernels for sm_80 and later: one list, from which come the
// instances, the table of configurations and what the gates expect.
#pragma once

#include <cstddef>
#include <tuple>

#include "../device/tile_shape.h"

namespace resnet_fused {

template <class... Shapes>
struct TileList {
  static constexpr int kSize = sizeof...(Shapes);
  template <int kIndex>
  using At = std::tuple_element_t<kIndex, std::tuple<Shapes...>>;

  // visit.operator()<Shape>() for the tile of that index, 0 <= index < kSize; its result.
  template <class Visit>
  static auto with(int index, Visit&& visit) {
    return pick<0>(index, visit);
  }

 private:
  template <int kIndex, class Visit>
  static auto pick(int index, Visit& visit) {
    if constexpr (kIndex + 1 < kSize) {
      if (index != kIndex) return pick<kIndex + 1>(index, visit);
    }
    return visit.template operator()<At<kIndex>>();
  }
};

// M, N, warps along M, along N, stages, blocks that are to share a multiprocessor: as many as their
// registers allow. Warps of 64x64 where the tile allows: each takes 63% of its share of shared
// memory's bandwidth then, one of 64x32 95%, one of 32x32 more than there is.
using ConvWideTiles = TileList<       //
    TileShape<256, 128, 4, 2, 4, 1>,  // many pixels, 128 channels and more
    TileShape<128, 128, 2, 2, 4, 2>,  // the work-horse
    TileShape<128, 64, 2, 2, 4, 3>,   // 64 channels
    TileShape<64, 128, 1, 4, 4, 3>,   // too few pixels to fill the GPU with 128 rows
    TileShape<64, 64, 2, 2, 4, 4>>;   // fewer still: small batches, with splits
using ConvNarrowTiles = TileList<     //
    TileShape<128, 64, 4, 1, 4, 2>,   // the stem, odd channels, NCHW
    TileShape<64, 32, 2, 2, 4, 3>>;   // narrow groups

}  // namespace resnet_fused
