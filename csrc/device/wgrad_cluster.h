// Blocks of a cluster that share the operands of a weight's gradient: which tile and which boxes
// are a block's own. What they share is ordered by turned_ring.h: dy and y are turned, x is read.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "gradient_geometry.h"
#include "turned_ring.h"
#include "wgrad_tma.h"

namespace resnet_fused {

// Tiles as wide and as high as those of a cluster together.
template <class Shape>
RF_HOST_DEVICE TileGrid cluster_tiles(const TileGrid& tiles) {
  return {(tiles.tiles_m + Shape::kRightSharing - 1) / Shape::kRightSharing,
          (tiles.tiles_n + Shape::kLeftSharing - 1) / Shape::kLeftSharing, tiles.groups,
          tiles.splits};
}

#if defined(RF_HAS_WGMMA)

// Where in its cluster a block is, and the blocks that share its operands, as masks of ranks.
// Neighbouring ranks share dy and y.
template <class Shape>
struct WgradClusterPlace {
  int32_t n = static_cast<int32_t>(ptx::cluster_rank() % Shape::kLeftSharing);
  int32_t m = static_cast<int32_t>(ptx::cluster_rank() / Shape::kLeftSharing);

  RF_DEVICE uint16_t with_its_left() const {
    return static_cast<uint16_t>(((1 << Shape::kLeftSharing) - 1) << m * Shape::kLeftSharing);
  }
  RF_DEVICE uint16_t with_its_right() const {
    uint32_t first = 0;  // of each row of ranks
    for (int i = 0; i < Shape::kRightSharing; ++i) first |= 1 << i * Shape::kLeftSharing;
    return static_cast<uint16_t>(first << n);
  }
};

// The block's tile. One behind the last row or column of tiles takes part, and its sums are
// nobody's.
template <class Shape>
RF_DEVICE Tile own_wgrad_tile(const TileGrid& tiles) {
  if constexpr (Shape::kSharing == 1) {
    return tile_of(blockIdx.x, tiles);
  } else {
    const WgradClusterPlace<Shape> place;
    Tile tile = tile_of(blockIdx.x / Shape::kSharing, cluster_tiles<Shape>(tiles));
    tile.m = tile.m * Shape::kRightSharing + place.m;
    tile.n = tile.n * Shape::kLeftSharing + place.n;
    // As tile_of counts them.
    const auto band = static_cast<int32_t>(kTileBand);
    const int32_t first = tile.m / band * band;
    const int32_t rows = tiles.tiles_m - first < band ? tiles.tiles_m - first : band;
    tile.index = static_cast<uint32_t>((tile.group * tiles.tiles_m + first) * tiles.tiles_n +
                                       tile.n * rows + tile.m - first);
    return tile;
  }
}

template <class Shape, int kLeftSharing, int kRightSharing>
struct RingType<SharedWgradShape<Shape, kLeftSharing, kRightSharing>> {
  using type = TurnedRing<Shape::kStages, kLeftSharing, kRightSharing>;
};

#endif

}  // namespace resnet_fused
