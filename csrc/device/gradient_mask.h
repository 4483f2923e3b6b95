// ReLU's mask and BatchNorm's scale on gradients that lie in shared memory.
//
// A thread applies them to what it has copied itself, once its copies have landed and before others
// read: each element once a block, where on fragments every warp along N would do it again.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "scalar.h"

namespace resnet_fused {

// What a thread copies at a time.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Unit {
  T value[kCount];
};

// scale * dz, rounded once: an operand of the product. dz = dy where the result passed the ReLU,
// not (y <= 0), so that NaN keeps its gradient. Zeros are put in before the rounding, which then
// takes neighbours together.
template <class T, int kCount>
RF_DEVICE void scale_and_mask(Unit<T, kCount>& dy, const Unit<T, kCount>& y,
                              const float (&scale)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float scaled = widen(dy.value[i]) * scale[i];
    dy.value[i] = narrow<T>(widen(y.value[i]) <= 0.0f ? 0.0f : scaled);
  }
}
// Without ReLU. A gradient of zero stays zero under any scale, as behind a mask: taps outside of
// the image have arrived as zeros, of which a scale that is not finite would make NaN.
template <class T, int kCount>
RF_DEVICE void scale_only(Unit<T, kCount>& dy, const float (&scale)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = widen(dy.value[i]);
    dy.value[i] = narrow<T>(value == 0.0f ? 0.0f : value * scale[i]);
  }
}

// dz alone, bit for bit: half words are cut off in place, rather than taken apart and put together.
template <class T, int kCount>
RF_DEVICE void mask(Unit<T, kCount>& dy, const Unit<T, kCount>& y) {
  if constexpr (sizeof(T) == 2) {
    using Words = Unit<uint32_t, kCount / 2>;
    auto words = __builtin_bit_cast(Words, dy);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (widen(y.value[2 * i]) <= 0.0f) words.value[i] &= 0xFFFF0000u;
      if (widen(y.value[2 * i + 1]) <= 0.0f) words.value[i] &= 0x0000FFFFu;
    }
    dy = __builtin_bit_cast(Unit<T, kCount>, words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (widen(y.value[i]) <= 0.0f) dy.value[i] = T{};
    }
  }
}

}  // namespace resnet_fused
