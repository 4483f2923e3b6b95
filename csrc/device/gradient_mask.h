// ReLU's mask and BatchNorm's scale on gradients that lie in shared memory.
//
// A thread applies them to what it has copied itself, once its copies have landed and before others
// read: each element once a block, where on fragments every warp along N would do it again.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "scalar.h"
#include "tile_shape.h"

namespace resnet_fused {

// What a thread copies at a time.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Unit {
  T value[kCount];
};

// A stage of the ring with a second tile of the left operand's layout behind both operands: y's,
// beside dy's.
template <class Shape>
struct MaskedShape : Shape {
  static constexpr int kMaskOffset = Shape::kStageBytes;
  static constexpr int kStageBytes = Shape::kStageBytes + Shape::kM * Shape::kStepBytes;
  static constexpr int kRingBytes = Shape::kStages * kStageBytes;
};

// dz = dy where the result passed the ReLU, not (y <= 0), so that NaN keeps its gradient.
template <class T, int kCount>
RF_DEVICE void mask(Unit<T, kCount>& dy, const Unit<T, kCount>& y) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (widen(y.value[i]) <= 0.0f) dy.value[i] = T{};
  }
}

// Times the channels' scale, rounded once: an operand of the product.
template <class T, int kCount>
RF_DEVICE void multiply(Unit<T, kCount>& dy, const float (&scale)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) dy.value[i] = narrow<T>(widen(dy.value[i]) * scale[i]);
}

}  // namespace resnet_fused
