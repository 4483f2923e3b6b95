// The shape of a tile of conv_bn_act for sm_90a whose tensors are float32, multiplied in TF32.
// Numbers alone: the launches know it as well.
#pragma once

#include "warpgroup_shape.h"

namespace resnet_fused {

// A WarpgroupShape with a staging for results of four bytes, and all that lies behind it.
template <class Shape>
struct Tf32Shape : Shape {
  static_assert(!Shape::kPixelsLeft, "tf32_epilogue.h stages channels that are rows");

  static constexpr int kStagingBytes = 2 * Shape::kStagingBytes;
  static constexpr int kVectorsAt = Shape::kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kRingAt = kVectorsAt + kConsumers * Shape::kVectorsBytes;
  static constexpr int kResidualAt = kRingAt + ring_bytes(Shape::kStages);
  static constexpr int kTurnsAt = kResidualAt + kConsumers * kBarrierBytes;
  static constexpr int kSharedBytes = kTurnsAt + kConsumers * kBarrierBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
