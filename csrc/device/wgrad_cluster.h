// Blocks of a cluster that share the operands of a weight's gradient: which tile and which boxes
// are a block's own, and the ring into which all of them copy.
//
// x is read by products alone: as in conv_bn_act, relaxed arrivals of the readers of all blocks
// tell each producer that x's part of a stage is free. dy and y are read by threads, behind which
// another block's copy has to be ordered. So a block's own producer waits until its readers have
// taken them, and passes that on, by one release of the cluster's scope for all of them: a fence of
// the whole GPU, of a thread that computes nothing, and early, for the left side lies in registers
// before the step's products begin.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "gradient_geometry.h"
#include "pipeline.h"
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

// Of `full`, all bytes of a step; of `empty`, x's readers in all blocks that share it. `taken`:
// this block's readers have dy and y in registers; `passed`: so have those of the others that share
// them.
template <class Shape>
struct WgradClusterRing : Ring<Shape::kStages, Shape::kRightSharing> {
  using Base = Ring<Shape::kStages, Shape::kRightSharing>;
  using typename Base::Place;
  static constexpr int kOthers = Shape::kLeftSharing - 1;

  RF_DEVICE void init(uint32_t readers) const {
    Base::init(readers);
    for (Place at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(taken_at(at), readers);
      if constexpr (kOthers > 0) ptx::mbarrier_init(passed_at(at), kOthers);
    }
  }

  // Of a warp that reads, behind its loads of dy and y.
  RF_DEVICE void taken(const Place& at) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(taken_at(at));
  }
  // The first kRightSharing lanes of such a warp, behind its products.
  RF_DEVICE void release(const Place& at) const {
    if constexpr (Shape::kRightSharing > 1) {
      const WgradClusterPlace<Shape> place;
      const uint32_t rank = static_cast<uint32_t>(place.n) + threadIdx.x % 32 * Shape::kLeftSharing;
      ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(this->empty(at), rank));
    } else {
      ptx::mbarrier_arrive(this->empty(at));
    }
  }

  // The producer's: waits until its block has taken the stage's dy and y, where it has had any, and
  // tells the others.
  RF_DEVICE void pass(const Place& at, bool had_any) const {
    if (!had_any) return;
    ptx::mbarrier_wait_parity(taken_at(at), at.parity ^ 1);
    if constexpr (kOthers > 0) {
      const auto own = static_cast<uint32_t>(WgradClusterPlace<Shape>().n);
      const uint32_t first = ptx::cluster_rank() - own;
#pragma unroll
      for (uint32_t i = 1; i < Shape::kLeftSharing; ++i) {
        const uint32_t rank = first + (own + i) % Shape::kLeftSharing;
        ptx::mbarrier_arrive_cluster(ptx::cluster_address(passed_at(at), rank));
      }
    }
  }
  // ... until the others have told, too, and expects `bytes` of the whole step.
  RF_DEVICE void acquire_left(const Place& at, uint32_t bytes) const {
    if constexpr (kOthers > 0) ptx::mbarrier_wait_parity_cluster(passed_at(at), at.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(this->full(at), bytes);
  }
  // ... until x's part of the stage has been read in all blocks that share it.
  RF_DEVICE void acquire_right(const Place& at) const {
    if constexpr (Shape::kRightSharing > 1) {
      ptx::mbarrier_wait_parity_relaxed(this->empty(at), at.parity ^ 1);
    } else {
      ptx::mbarrier_wait_parity(this->empty(at), at.parity ^ 1);
    }
  }

 private:
  RF_DEVICE ptx::SharedAddress taken_at(const Place& at) const {
    return this->barriers + (2 * Shape::kStages + at.stage) * kBarrierBytes;
  }
  RF_DEVICE ptx::SharedAddress passed_at(const Place& at) const {
    return this->barriers + (3 * Shape::kStages + at.stage) * kBarrierBytes;
  }
};

template <class Shape, int kLeftSharing, int kRightSharing>
struct RingType<SharedWgradShape<Shape, kLeftSharing, kRightSharing>> {
  using type = WgradClusterRing<SharedWgradShape<Shape, kLeftSharing, kRightSharing>>;
};

#endif

}  // namespace resnet_fused
