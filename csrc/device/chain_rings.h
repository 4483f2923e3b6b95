// The kernel of conv_chain for sm_90a where whole steps of `out` are too large for stages: the
// shape of its tiles, and what lies where in the shared memory of a block. Plain values, which a
// launch computes on the host; its arguments are those of chain_tma.h.
//
// Each part of a step comes through a ring of its own, and is free as soon as it has been read: the
// filters that make `out`, the shortcut, of which `out` takes the place, and the filters that read
// it.
#pragma once

#include "chain_tma.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// As ChainTmaShape, of 16 bits and without a projection, for two blocks that share filters: filters
// of kStages_ steps and kBoxStages_ shortcuts in flight or in use.
template <int kInner_, int kNext_, int kStages_, int kBoxStages_>
struct ChainRingsShape : ChainBoxes {
  static constexpr int kInner = kInner_;
  static constexpr int kNext = kNext_;
  static constexpr int kStages = kStages_;
  static constexpr int kBoxStages = kBoxStages_;
  static constexpr int kProjected = 0;
  static constexpr int kSharing = 2;
  static constexpr bool kInRings = true;
  static constexpr int kInnerBoxes = kInner / kStepElements;
  static constexpr int kProjectedBoxes = 0;
  static constexpr int kNextBoxes = kNext / kStepElements;
  static_assert(kInner % kStepElements == 0 && kNext % kStepElements == 0 && kNext <= 256);
  static_assert(kStages >= 2 && kBoxStages >= 2, "one step in use, one arriving");

  static constexpr int kRowsBytes = kInnerBoxes * kBoxBytes;  // that a tile reads
  // So many boxes of `next` at a time have room in the rows that its tile has read.
  static constexpr int kNextAtOnce = kNextBoxes < kInnerBoxes ? kNextBoxes : kInnerBoxes;

  // Of a step: filters that make `out`, and those that read it.
  static constexpr int kMakingBytes = kInnerBoxes * kWeightBytes;
  static constexpr int kReadingBytes = kNext * kRowBytes;

  // From a multiple of 1024: the rows of two tiles; the rings' stages; scale and shift of `out` and
  // of `next`; barriers.
  static constexpr int kMakingAt = 2 * kRowsBytes;
  static constexpr int kReadingAt = kMakingAt + kStages * kMakingBytes;
  static constexpr int kBoxesAt = kReadingAt + kStages * kReadingBytes;
  static constexpr int kVectorsAt = kBoxesAt + kBoxStages * kBoxBytes;
  static constexpr int kNextVectorsAt = kVectorsAt + kChainTmaMostChannels * kChannelBytes;
  static constexpr int kMakingRingAt = kNextVectorsAt + kNext * kChannelBytes;
  static constexpr int kReadingRingAt = kMakingRingAt + ring_bytes(kStages);
  static constexpr int kBoxRingAt = kReadingRingAt + ring_bytes(kStages);
  static constexpr int kRowsRingAt = kBoxRingAt + ring_bytes(kBoxStages);
  static constexpr int kSharedBytes = kRowsRingAt + ring_bytes(2);
  static_assert(kWeightBytes / kSharing % kTileAlignment == 0, "parts of filters");
  static_assert(kReadingBytes / kSharing % kTileAlignment == 0, "likewise");
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
