// The tiles of a network's kernel: each layer has one of them, by its place in the list. Numbers
// and the choice alone: the launches know them as well.
#pragma once

#include <cstdint>

#include "portable.h"
#include "tile_shape.h"

namespace resnet_fused {

// Their threads are the same ones, and they take turns in the same shared memory.
template <class First, class... Rest>
struct NetworkTiles {
  static constexpr int kSize = 1 + sizeof...(Rest);
  static constexpr int kThreads = First::kThreads;
  static constexpr int kBlocks = First::kBlocks;
  static_assert(((Rest::kThreads == kThreads && Rest::kBlocks == kBlocks) && ...));

  // The rings begin where shared memory does; behind the largest there is room for the sums of a
  // tile, [kM][kN] floats.
  static constexpr int kRingBytes = [] {
    int most = First::kRingBytes;
    ((most = Rest::kRingBytes > most ? Rest::kRingBytes : most), ...);
    return most;
  }();
  static constexpr int kSumBytes = [] {
    int most = First::kM * First::kN;
    ((most = Rest::kM * Rest::kN > most ? Rest::kM * Rest::kN : most), ...);
    return most * 4;
  }();

  // visit.operator()<Shape>() for the tile at that place, 0 <= index < kSize.
  template <class Visit>
  static RF_HOST_DEVICE void with(int index, const Visit& visit) {
    if constexpr (sizeof...(Rest) > 0) {
      if (index > 0) {
        NetworkTiles<Rest...>::with(index - 1, visit);
        return;
      }
    }
    visit.template operator()<First>();
  }
};

// Through global memory: 64 x 64 alone, as one of conv_bn_act's configurations has it. At batch 1
// there are few pixels, and small tiles with splits fill a GPU. The ring is deeper: what is asked
// for ahead of a meeting, a step's filters for each stage but one, comes while the blocks wait.
using NetworkShape = TileShape<64, 64, 2, 2, 8, 2>;
using MemoryTiles = NetworkTiles<NetworkShape>;

// By clusters, which only GPUs with more shared memory have: as deep as two blocks find room for.
// Half as many pixels where 64 of them would leave multiprocessors without a tile.
using ClusterTiles = NetworkTiles<TileShape<64, 64, 2, 2, 12, 2>, TileShape<32, 64, 2, 2, 14, 2>>;
constexpr int kClusterSharedBytes = ClusterTiles::kRingBytes + ClusterTiles::kSumBytes;
static_assert(2 * (kClusterSharedBytes + 1024) <= 228 * 1024);

}  // namespace resnet_fused
