// The shape of a block whose filters stay in shared memory for all of its tiles, and what lies
// where. Numbers alone: the launches know it as well.
#pragma once

#include <cstdint>

#include "warpgroup_shape.h"

namespace resnet_fused {

// A tile is 128 pixels by 128 channels, which are the products' left side. Each of the two
// consuming warpgroups has every other tile for itself, in two halves of 64 channels. kSteps: of a
// tile, at most.
template <int kStages_, int kSteps_>
struct StationaryShape {
  static constexpr Orientation kOrientation = Orientation::kChannelsLeft;
  static constexpr bool kPixelsLeft = false;
  static constexpr bool kTogether = false;
  static constexpr int kPixels = 128;
  static constexpr int kChannels = 128;
  static constexpr int kHalves = kChannels / kWarpgroupRows;
  static constexpr int kStages = kStages_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kSharing = 1;
  static constexpr bool kTransforms = false;
  static constexpr int kColumns = kPixels;
  static constexpr int kReaders = kWarpgroupWarps;  // of a stage
  static constexpr int kStoredPixels = kPixels;
  // Of a thread that transforms: 128 rows are no multiple of 24, which takes more than others have.
  static constexpr int kTransformRegisters = 72;

  // From a multiple of 1024: the stages, pixels alone; the filters of all steps; for each consumer
  // a staging tile, for one half of its channels at a time; the ring's barriers, the filters' one,
  // and one a consumer for its turn.
  static constexpr int kStageBytes = kPixels * kStepRowBytes;
  static constexpr int kPixelsAt = 0;
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;  // of a step
  static constexpr int kFiltersAt = kStages * kStageBytes;
  static constexpr int kStagingAt = kFiltersAt + kSteps * kFilterBytes;
  static constexpr int kStagingBytes = kColumns * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kFiltersCameAt = kRingAt + ring_bytes(kStages);
  static constexpr int kTurnsAt = kFiltersCameAt + kBarrierBytes;
  static constexpr int kSharedBytes = kTurnsAt + kConsumers * kBarrierBytes;
  static_assert(kStageBytes % kTileAlignment == 0 && kFilterBytes % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
