// What conv_bn_stats' kernel is told beside its operands: the BatchNorm that it reads through, and
// where the statistics of its tiles meet. Plain values, which a launch computes on the host.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "portable.h"
#include "stats_norm.h"
#include "tile_chunks.h"

namespace resnet_fused {

// Of some pixels of a channel: their mean, and the sum of the squares of what each is off it.
struct alignas(8) Moments {
  float mean;
  float m2;
};
struct alignas(16) WideMoments {
  double mean;
  double m2;
};

// Bytes of shared memory: the ring, and behind it the moments of the tile's columns, of each band
// of warps.
template <class Shape>
constexpr int kStatsSharedBytes =
    Shape::kRingBytes + Shape::kWarpsM * Shape::kN * static_cast<int>(sizeof(Moments));

// Pixels in tiles, over all launches: each begins with a tile of its own.
struct PixelTiles {
  int64_t pixels;
  int64_t pixels_a_launch;  // but for the last one
  int32_t tiles_a_launch;
  int32_t tiles;       // of all launches
  int32_t first_tile;  // of this one
  int32_t rows;        // of a whole tile

  RF_HOST_DEVICE int32_t count() const { return tiles; }
  // Pixels of all tiles ahead of one: the last tile of a launch may have fewer than others.
  RF_HOST_DEVICE int64_t before(int32_t tile) const {
    const int32_t launch = tile < tiles_a_launch ? 0 : tile / tiles_a_launch;
    const int64_t begun = launch * pixels_a_launch;
    const int64_t at = begun + static_cast<int64_t>(tile - launch * tiles_a_launch) * rows;
    return at < pixels ? at : pixels;
  }
};

struct ConvBnStatsArguments {
  ConvOperands operands;
  int32_t steps;       // of the whole reduction
  int32_t steps_each;  // of a split; the last one may have fewer, and has one at least
  TileGrid tiles;
  int32_t walkers;           // blocks along M that stay for many tiles; 0: each block has one
  SplitWorkspace workspace;  // unused without splits
  const float* scale;        // [C] of the layer before; null: x is read as it is
  const float* shift;        // [C]
  void* y;                   // [N, K, P, Q] in `y_strides`
  PixelStrides y_strides;
  int32_t channels;          // of one group
  bool wide_y;               // 16 bytes at a time: adjacent channels, all aligned
  bool pixels_lie_together;  // element by element: neighbouring threads take neighbouring pixels
  PixelTiles measured;
  uint32_t* arrivals;   // [group][column of tiles][chunks + 1], zero before the first launch
  Moments* moments;     // [tile of pixels][K]
  WideMoments* merged;  // [chunk][K]; unused where there is one chunk
  float* stats;         // [2, K]: mean, M2
  void* counters;       // of the splits and of the statistics: for the launch, which clears them
  int64_t cleared_bytes;
  StatsNorm finalized;

  RF_HOST_DEVICE int32_t filters() const { return channels * tiles.groups; }
};

}  // namespace resnet_fused
