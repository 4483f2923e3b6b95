// What the gradients of an input for sm_90a are told, and the shape of a block's tile. Numbers
// alone: the launches know it as well.
#pragma once

#include "../ptx/tensor_map.h"
#include "tma_conv.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// The gradient of an input by a stride of 1 is a convolution of dy with filters whose channels have
// changed sides and whose taps are walked backwards.
struct ConvDgradTmaArguments {
  // x is dy; weight {C / groups, S, R, K}, as it lies; out is dx; scale is of dy's channels, the
  // reduction; no shift, no residual.
  ConvTmaArguments conv;
  ptx::TensorMap y;  // mapped as dy is
  bool masked;       // y is read
};

// Pixels on the left, which threads turn in registers on their way into the products; of the right
// side, filters as they lie, boxes of 64 input channels.
template <int kChannels_, int kStages_>
struct DgradTmaShape {
  static constexpr bool kPixelsLeft = true;
  static constexpr bool kTogether = true;
  static constexpr int kSharing = 1;
  static constexpr int kPixels = kConsumers * kWarpgroupRows;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kColumns = kChannels;
  static constexpr int kReaders = kConsumers * kWarpgroupWarps;
  static constexpr int kStoredPixels = kWarpgroupRows;
  static_assert(kColumns % kStepElements == 0 && kColumns <= 256);
  static_assert(kStages >= 2, "one step in use, one arriving");

  // From a multiple of 1024: the stages, each dy, y and the filters; a staging tile for each
  // consumer; the ring's barriers.
  static constexpr int kPixelBytes = kPixels * kStepRowBytes;
  static constexpr int kPixelsAt = 0;
  static constexpr int kMaskAt = kPixelBytes;
  static constexpr int kFiltersAt = 2 * kPixelBytes;
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;
  static constexpr int kStageBytes = kFiltersAt + kFilterBytes;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kStagingBytes = kColumns * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kSharedBytes = kRingAt + ring_bytes(kStages);
  static_assert(kStageBytes % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
