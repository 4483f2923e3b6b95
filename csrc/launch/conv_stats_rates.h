// What the plans of convolutions that measure what they store share. Inside of this room.
#pragma once

#include "../device/stats_geometry.h"
#include "../device/tile_chunks.h"
#include "conv_plan.h"

namespace resnet_fused {

// Instructions to widen, multiply, add and pack an element that is read through a BatchNorm.
constexpr double kTurnInstructions = 3.5;
// Instructions to round, add and square an element of the result.
constexpr double kMeasureInstructions = 8;
// Cycles of the shuffles of a column's band of rows: 8 lanes, 6 of them, 32 lanes a cycle.
constexpr double kShuffleCycles = 1.5;
// Beyond, the parts of these networks' reductions are a step or two long.
constexpr int kMostStatsSplits = 32;

// Cycles of `busy` blocks whose steps take so many: with measuring, merging and the result's way.
inline double ended_cycles(const RfConvConfiguration& tile, int64_t bytes, int64_t splits,
                           double busy, double resident, double steps) {
  const double area = static_cast<double>(tile.m) * tile.n;
  const double measuring =
      area * kMeasureInstructions / kInstructions + tile.warps_m * tile.n * kShuffleCycles;
  // Of each chunk's tiles one merges them all.
  const double merging = tile.n * double{sizeof(Moments)} / kCacheBytes + kLatency / kChunkTiles;
  const double ends = area * static_cast<double>(bytes) / kMemoryBytes;
  double total = kMeeting + blocks_cycles(busy, resident, steps + measuring + merging, ends);
  if (splits > 1) {
    const double part = area * 4 / kCacheBytes;
    total += (busy + static_cast<double>(splits)) * part;
  }
  return total;
}

}  // namespace resnet_fused
