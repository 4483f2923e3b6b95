// The BatchNorm and ReLU of the layer before on what lies in shared memory, where a thread has
// copied it itself: relu(scale * x + shift), rounded as if it had been stored, an operand of a
// product.
#pragma once

#include <cstdint>

#include "bn_act.h"
#include "gradient_mask.h"
#include "pair.h"
#include "vector.h"

namespace resnet_fused {

// value(i), in float32, of each element; neighbours are rounded together.
template <class T, int kCount, class Value>
RF_DEVICE Unit<T, kCount> rounded(const Value& value) {
  if constexpr (sizeof(T) == 2) {
    Unit<uint32_t, kCount / 2> words;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      words.value[i / 2] = narrow_pair<T>(value(i), value(i + 1));
    }
    return __builtin_bit_cast(Unit<T, kCount>, words);
  } else {
    Unit<T, kCount> unit;
#pragma unroll
    for (int i = 0; i < kCount; ++i) unit.value[i] = value(i);
    return unit;
  }
}

template <class T, int kCount>
RF_DEVICE void normalise(Unit<T, kCount>& unit, const float (&scale)[kCount],
                         const float (&shift)[kCount]) {
  const BnAct<float> op{0.0f};
  unit = rounded<T, kCount>([&](int i) { return op(widen(unit.value[i]), scale[i], shift[i]); });
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
