// The shape of a block of bn_add_act_conv_stats for sm_90a, and what lies where in its shared
// memory. Numbers alone: the launches know it as well.
#pragma once

#include <cstdint>

#include "warpgroup_shape.h"

namespace resnet_fused {

// A tile is kPixels by kChannels, which are the products' left side: the two consuming warpgroups
// share them, in one or two halves of 64 channels each. All of a tile's channels in one block: what
// a step makes of its pixels serves them all.
template <int kPixels_, int kChannels_, int kStages_>
struct BlockEndShape {
  static constexpr Orientation kOrientation = Orientation::kChannelsLeft;
  static constexpr bool kPixelsLeft = false;
  static constexpr bool kTogether = true;
  static constexpr int kPixels = kPixels_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kHalves = kChannels / (kConsumers * kWarpgroupRows);
  static constexpr int kSharing = 1;
  static constexpr bool kTransforms = false;
  static constexpr int kColumns = kPixels;
  static constexpr int kReaders = kConsumers * kWarpgroupWarps;  // of a stage
  static constexpr int kStoredPixels = kPixels;
  // Of a thread that transforms: two tensors' units, and scales and shifts of one or of both.
  static constexpr int kTransformRegisters = 72;
  static_assert(kChannels == kHalves * kConsumers * kWarpgroupRows && kHalves <= 2);
  static_assert(kHalves * kColumns <= 256 && kColumns % 32 == 0, "sums that registers hold");

  // From a multiple of 1024: the stages, each filters, pixels of the raw output, in whose place the
  // block's end is made, and those of the shortcut; a staging tile for each consumer, one half of
  // its channels at a time; barriers, of which those of a residual are not used.
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;
  static constexpr int kPixelBytes = kPixels * kStepRowBytes;
  static constexpr int kFiltersAt = 0;
  static constexpr int kPixelsAt = kFilterBytes;
  static constexpr int kShortcutAt = kPixelsAt + kPixelBytes;
  static constexpr int kStageBytes = kShortcutAt + kPixelBytes;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStagingBytes = kColumns * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kResidualAt = kRingAt + ring_bytes(kStages);
  static constexpr int kSharedBytes = kResidualAt + kConsumers * kBarrierBytes;
  static_assert(kStageBytes % kTileAlignment == 0 && kPixelBytes % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
