// The kernel of conv_chain for sm_90a where whole steps of `out` are too large for stages: the
// shape of its tiles, and what lies where in the shared memory of a block. Plain values, which a
// launch computes on the host; its arguments are those of chain_tma.h.
//
// Each part of a step comes through a ring of its own, and is free as soon as it has been read: the
// filters that make `out`, the shortcut, of which `out` takes the place, and the filters that read
// it.
//
// With a projection there is room for the rows of one tile. Each warpgroup has its own pixels', and
// asks for the next tile's when its last products over them have ended. Filters that make `out`
// come in parts, as large as those of the first convolution, and `out` is made in one box.
#pragma once

#include "chain_tma.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// As ChainTmaShape, of 16 bits and for two blocks that share filters: kMakingStages_ parts of the
// filters that make `out`, kStages_ steps' filters that read it, and kBoxStages_ boxes in flight or
// in use.
template <int kInner_, int kNext_, int kMakingStages_, int kStages_, int kBoxStages_,
          int kProjected_ = 0>
struct ChainRingsShape : ChainBoxes {
  static constexpr int kInner = kInner_;
  static constexpr int kNext = kNext_;
  static constexpr int kStages = kStages_;
  static constexpr int kBoxStages = kBoxStages_;
  static constexpr int kMakingStages = kMakingStages_;
  static constexpr int kProjected = kProjected_;
  static constexpr int kSharing = 2;
  static constexpr bool kInRings = true;
  static constexpr bool kOwnRows = kProjected > 0;  // of each warpgroup, of one tile
  static constexpr int kInnerBoxes = kInner / kStepElements;
  static constexpr int kProjectedBoxes = kProjected / kStepElements;
  static constexpr int kParts = 1 + kProjected / kInner;  // of what makes a step of `out`
  static constexpr int kNextBoxes = kNext / kStepElements;
  static_assert(kInner % kStepElements == 0 && kNext % kStepElements == 0 && kNext <= 256);
  static_assert(kProjected % kInner == 0, "whole parts");
  static_assert(kStages >= 2 && kMakingStages > kParts, "one step in use, one arriving");
  static_assert(kOwnRows ? kBoxStages == 1 : kBoxStages >= 2, "only a shortcut arrives");
  // Steps whose filters have room in empty rings.
  static constexpr int kEarlySteps =
      kMakingStages / kParts < kStages ? kMakingStages / kParts : kStages;

  static constexpr int kRowsBytes = (kInnerBoxes + kProjectedBoxes) * kBoxBytes;
  static constexpr int kRowsTiles = kOwnRows ? 1 : 2;
  // So many boxes of `next` at a time have room in the rows that its tile has read, or where `out`
  // is made.
  static constexpr int kMostAtOnce = kOwnRows ? kBoxStages : kInnerBoxes;
  static constexpr int kNextAtOnce = kNextBoxes < kMostAtOnce ? kNextBoxes : kMostAtOnce;

  // Of a part of the filters that make `out`, and of a step's that read it.
  static constexpr int kMakingBytes = kInnerBoxes * kWeightBytes;
  static constexpr int kReadingBytes = kNext * kRowBytes;

  // From a multiple of 1024: the tiles' rows; the rings' stages; scale and shift of `out`, of its
  // projection and of `next`; barriers: the rings', and those of the rows, a ring of two tiles or
  // one for each warpgroup and part.
  static constexpr int kMakingAt = kRowsTiles * kRowsBytes;
  static constexpr int kReadingAt = kMakingAt + kMakingStages * kMakingBytes;
  static constexpr int kBoxesAt = kReadingAt + kStages * kReadingBytes;
  static constexpr int kVectorsAt = kBoxesAt + kBoxStages * kBoxBytes;
  static constexpr int kProjectionVectorsAt = kVectorsAt + kChainTmaMostChannels * kChannelBytes;
  static constexpr int kNextVectorsAt =
      kProjectionVectorsAt + (kProjected > 0 ? kChainTmaMostChannels * kChannelBytes : 0);
  static constexpr int kMakingRingAt = kNextVectorsAt + kNext * kChannelBytes;
  static constexpr int kReadingRingAt = kMakingRingAt + ring_bytes(kMakingStages);
  static constexpr int kBoxRingAt = kReadingRingAt + ring_bytes(kStages);
  static constexpr int kRowsRingAt = kBoxRingAt + ring_bytes(kBoxStages);
  static constexpr int kSharedBytes =
      kRowsRingAt + (kOwnRows ? kConsumers * kParts * kBarrierBytes : ring_bytes(2));
  static_assert(kWeightBytes / kSharing % kTileAlignment == 0, "parts of filters");
  static_assert(kReadingBytes / kSharing % kTileAlignment == 0, "likewise");
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
