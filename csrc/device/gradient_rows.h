// A warpgroup's tile of gradients as it is stored, and the sums of its channels: the threads go
// down its rows, each with eight channels, so that a channel's sums take no shuffles, and meet in
// shared memory.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/ptx.h"
#include "gradient_mask.h"
#include "scalar.h"
#include "tile_shape.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Of each consumer's two tiles, the one of the gradients and the one beside it.
template <class Shape>
RF_DEVICE void init_tile_barriers(ptx::SharedAddress shared) {
  for (int i = 0; i < kConsumers; ++i) {
    for (int j = 0; j < 2; ++j) {
      ptx::mbarrier_init(shared + Shape::kOwnAt + i * Shape::kOwnBytes + j * kBarrierBytes, 1);
    }
  }
}

template <class T, int kColumns>
class GradientRows {
  static constexpr int kUnits = kColumns * static_cast<int>(sizeof(T)) / kChunkBytes;  // of a row
  static constexpr int kLanes = kWarpgroupThreads / kUnits;  // threads of a unit's column
  static constexpr int kPiece = 4;                           // floats that move together
  using Piece = Unit<float, kPiece>;

 public:
  using Staged = StagedTile<Orientation::kPixelsLeft, kColumns>;
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));  // channels of a thread
  static_assert(kUnit == 2 * kPiece && kUnits >= 8);

  // meeting: shared memory of the warpgroup's own, eight floats a thread for each sum.
  RF_DEVICE GradientRows(ptx::SharedAddress meeting, uint32_t thread)
      : meeting_(meeting), thread_(thread) {}

  // What is there of a tile: mean is of its first channel.
  struct Place {
    const float* mean;
    int32_t channels;
    int32_t rows;
  };

  // This thread's sums of dx, where there are two, and of dx (other - mean).
  template <int kSums>
  RF_DEVICE void take(float (&sums)[kSums][kUnit], const Staged& dx, const Staged& other,
                      const Place& place) const {
    const auto channel = static_cast<int32_t>(thread_ % kUnits * kUnit);
    float means[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const bool known = channel + i < place.channels;
      means[i] = known ? ptx::load_global_read_only(place.mean + channel + i) : 0.0f;
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s][i] = 0.0f;
    }
#pragma unroll 4
    for (uint32_t row = thread_ / kUnits; row < kWarpgroupRows; row += kLanes) {
      if (static_cast<int32_t>(row) >= place.rows) break;
      const auto gradient = load(dx, row), beside = load(other, row);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const float passed = widen(gradient.value[i]);
        if constexpr (kSums > 1) sums[0][i] += passed;
        float& last = sums[kSums - 1][i];
        last = __builtin_fmaf(passed, widen(beside.value[i]) - means[i], last);
      }
    }
  }

  template <int kSums>
  RF_DEVICE void leave(const float (&sums)[kSums][kUnit]) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int p = 0; p < kUnit / kPiece; ++p) {
        Piece piece;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) piece.value[e] = sums[s][p * kPiece + e];
        const uint32_t at = place_of(s, thread_ / kUnits, p) + thread_ % kUnits;
        ptx::store_shared(meeting_ + at * sizeof(Piece), piece);
      }
    }
  }

  // The tile's channel that this thread, of the first kColumns, adds up once all have left theirs.
  RF_DEVICE int32_t column() const {
    return static_cast<int32_t>(thread_ / kPiece % kUnits * kUnit + piece() * kPiece +
                                thread_ % kPiece);
  }
  RF_DEVICE float total(int sum) const {
    double total = 0;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t at = place_of(sum, lane, piece()) * kPiece + thread_ % (kUnits * kPiece);
      total += static_cast<double>(ptx::load_shared<float>(meeting_ + at * sizeof(float)));
    }
    return static_cast<float>(total);
  }

 private:
  // A thread's unit of a row.
  RF_DEVICE Unit<T, kUnit> load(const Staged& tile, uint32_t row) const {
    const uint32_t unit = thread_ % kUnits;
    return ptx::load_shared<Unit<T, kUnit>>(tile.box(unit / 8) + row * kStepRowBytes +
                                            (unit % 8 ^ row % 8) * kChunkBytes);
  }
  // Where a lane's pieces of a sum lie, one of each unit side by side.
  static RF_DEVICE uint32_t place_of(int sum, uint32_t lane, uint32_t piece) {
    return ((sum * kLanes + lane) * 2 + piece) * kUnits;
  }
  RF_DEVICE uint32_t piece() const { return thread_ / (kUnits * kPiece); }

  ptx::SharedAddress meeting_;
  uint32_t thread_;
};

#endif

}  // namespace resnet_fused
