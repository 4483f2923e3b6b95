// The BatchNorm and ReLU of the layer before on what lies in shared memory, where a thread has
// copied it itself: relu(scale * x + shift), rounded as if it had been stored, an operand of a
// product.
#pragma once

#include <cstdint>

#include "bn_act.h"
#include "gradient_mask.h"
#include "pair.h"

namespace resnet_fused {

template <class T, int kCount>
RF_DEVICE void normalise(Unit<T, kCount>& unit, const float (&scale)[kCount],
                         const float (&shift)[kCount]) {
  const BnAct<float> op{0.0f};
  if constexpr (sizeof(T) == 2) {
    using Words = Unit<uint32_t, kCount / 2>;
    Words words;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      words.value[i / 2] = narrow_pair<T>(op(widen(unit.value[i]), scale[i], shift[i]),
                                          op(widen(unit.value[i + 1]), scale[i + 1], shift[i + 1]));
    }
    unit = __builtin_bit_cast(Unit<T, kCount>, words);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) unit.value[i] = op(unit.value[i], scale[i], shift[i]);
  }
}

// The same of pairs of 16 bits as words, which no half is taken out of and put back into: half as
// many instructions. Rounding keeps the sign, so that the ReLU may follow it.
template <class T, int kCount>
RF_DEVICE void normalise_pairs(uint32_t (&pairs)[kCount], const float (&scale)[2 * kCount],
                               const float (&shift)[2 * kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float low = widen(T{static_cast<uint16_t>(pairs[i])});
    const float high = widen(T{static_cast<uint16_t>(pairs[i] >> 16)});
    pairs[i] =
        larger_pair<T>(narrow_pair<T>(__builtin_fmaf(scale[2 * i], low, shift[2 * i]),
                                      __builtin_fmaf(scale[2 * i + 1], high, shift[2 * i + 1])),
                       0);
  }
}

}  // namespace resnet_fused
