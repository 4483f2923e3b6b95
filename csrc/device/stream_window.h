// The window kernels for sm_90a whose filters are more than a block's shared memory holds: the
// shape of their tiles, and what lies where in it. Numbers alone: the launches know it as well.
//
// Channels of what is read come in slices of 64. A slice is a window of conv_window.h's walk, and
// the filters of nine taps go with it, tap by tap through a ring, in the order in which they are
// multiplied by. A tile's sums stay in registers over all slices.
#pragma once

#include "conv_window.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// kPixels positions by 64 filters a tile, a tile for each of two warpgroups in turns; two windows,
// a slice each; kFilterStages taps of a slice in flight or in use.
template <int kPixels_, int kFilterStages_>
struct StreamWindowShape {
  static constexpr int kPixels = kPixels_;
  static constexpr int kFilterStages = kFilterStages_;
  static constexpr int kRowBytes = kStepRowBytes;
  static constexpr int kPasses = 1;
  static constexpr int kStages = kConsumers;  // of the windows' ring
  static constexpr int kSharing = 1;
  static constexpr bool kTransforms = false;  // what has landed, before it is multiplied
  static_assert(kPixels % 16 == 0 && kPixels <= 256);
  static_assert(kFilterStages >= 3, "one tap in use, one asked for, one arriving");
  static_assert(kFilterStages <= kWindowTaps + 1, "a window is asked for within a slice");

  // From a multiple of 1024: taps' filters; a staging tile for each consumer; barriers: the
  // windows' ring, the filters', one a consumer for its turn; the windows, whose size a launch
  // knows.
  static constexpr int kStagingAt = kFilterStages * kWindowFilterBytes;
  static constexpr int kStagingBytes = kPixels * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kFilterRingAt = kRingAt + ring_bytes(kStages);
  static constexpr int kTurnsAt = kFilterRingAt + ring_bytes(kFilterStages);
  static constexpr int kSharedBytes = kTurnsAt + kConsumers * kBarrierBytes;  // but for windows
  static constexpr int kWindowsAt =
      (kSharedBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static_assert(kStagingAt % kTileAlignment == 0 && kStagingBytes % kTileAlignment == 0);
};

}  // namespace resnet_fused
