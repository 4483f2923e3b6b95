// BatchNorm's backward on gradients that lie in shared memory, where a thread has copied them
// itself: dy = A dz + (B y + C), rounded as if it had been stored, an operand of a product.
#pragma once

#include "gradient_mask.h"
#include "pair.h"
#include "scalar.h"

namespace resnet_fused {

// A, B and C of a unit's channels.
template <int kCount>
struct BackwardRows {
  float a[kCount];
  float b[kCount];
  float c[kCount];
};

// Float stays as it is: what multiplies rounds it to TF32.
template <class T, int kCount>
RF_DEVICE void apply_backward(Unit<T, kCount>& dz, const Unit<T, kCount>& y,
                              const BackwardRows<kCount>& rows) {
  const auto dy = [&](int i) {
    const float rest = __builtin_fmaf(rows.b[i], widen(y.value[i]), rows.c[i]);
    return __builtin_fmaf(rows.a[i], widen(dz.value[i]), rest);
  };
  if constexpr (sizeof(T) == 2) {
    Unit<uint32_t, kCount / 2> words;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) words.value[i / 2] = narrow_pair<T>(dy(i), dy(i + 1));
    dz = __builtin_bit_cast(Unit<T, kCount>, words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) dz.value[i] = dy(i);
  }
}

}  // namespace resnet_fused
