// The kernel of conv_chain for sm_90a with a 3x3 convolution of 128 channels in front: the shape of
// its tiles, and what lies where in the shared memory of a block. Plain values, which a launch
// computes on the host; its arguments are those of chain_window.h.
//
// Of 544 KB of filters none can stay. All of them come in units of one size, in the order in which
// they are multiplied by: for the 3x3 a tap of 64 of its input's channels, for `out` a step of 64
// channels, for `next` 64 of what it reads.
#pragma once

#include "chain_tma.h"
#include "chain_window.h"
#include "conv_window.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// As many channels of x, of what the front makes, and of `next`: kWide_; up to kSteps_ steps of 64
// channels of `out`; kStages_ units of filters in flight or in use, and kBoxStages_ shortcuts.
template <int kWide_, int kSteps_, int kStages_, int kBoxStages_>
struct ChainStreamShape : ChainBoxes {
  static constexpr int kFront = kWide_;
  static constexpr int kNext = kWide_;  // sums of `next` stand where the front's have been
  static constexpr int kSteps = kSteps_;
  static constexpr int kStages = kStages_;
  static constexpr int kBoxStages = kBoxStages_;
  static constexpr int kProjected = 0;
  static constexpr int kSharing = 2;  // blocks of a cluster that share filters
  static constexpr int kFrontBoxes = kFront / kStepElements;
  static_assert(kFrontBoxes == kSharing, "of a step of `out` each block asks for one box");

  static constexpr int kFrontUnits = kFrontBoxes * kWindowTaps;
  static constexpr int kUnitBytes = kFront * kStepRowBytes;
  static constexpr int kUnitPart = kUnitBytes / kSharing;  // that a block asks for
  static constexpr int kPartRows = kUnitPart / kStepRowBytes;
  static_assert(kPartRows == kStepElements, "a part of any unit is 64 filters of 64 channels");
  static_assert(kStages < kFrontUnits, "the first units are the front's");
  static_assert(kStages >= 3 && kBoxStages >= 2, "what is in use at a time, one arriving");

  static constexpr FilterBytes kStaying{};
  static constexpr FilterBytes kStreamed{kFrontUnits * kUnitBytes, 2 * kUnitBytes};

  // From a multiple of 1024: units of filters; boxes of the shortcut, of which `out` takes the
  // place; scale and shift of the front, of `out` and of `next`; barriers: the units' ring, the
  // boxes', the window's; the window, a part for each 64 channels, whose size a launch knows.
  static constexpr int kBoxesAt = kStages * kUnitBytes;
  static constexpr int kFrontVectorsAt = kBoxesAt + kBoxStages * kBoxBytes;
  static constexpr int kVectorsAt = kFrontVectorsAt + kFront * kChannelBytes;
  static constexpr int kNextVectorsAt = kVectorsAt + kSteps * kStepElements * kChannelBytes;
  static constexpr int kRingAt = kNextVectorsAt + kNext * kChannelBytes;
  static constexpr int kBoxRingAt = kRingAt + ring_bytes(kStages);
  static constexpr int kWindowRingAt = kBoxRingAt + ring_bytes(kBoxStages);
  static constexpr int kBarriersEnd = kWindowRingAt + ring_bytes(1);
  static constexpr int kWindowAt =
      (kBarriersEnd + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static_assert(kUnitPart % kTileAlignment == 0 && kBoxBytes % kTileAlignment == 0);
};

}  // namespace resnet_fused
