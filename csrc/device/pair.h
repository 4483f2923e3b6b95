// Two 16-bit values in a register: made from floats, and the larger of each of two pairs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/common.h"
#include "scalar.h"

namespace resnet_fused {

struct FloatPair {
  float low;
  float high;
};

#if defined(__CUDA_ARCH__)
// CUDA's vector types have constructors, so that no bit_cast takes them.
template <class To, class From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
#endif

// `first` in the lower half; each rounded as `narrow` does.
template <class T>
RF_DEVICE uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return same_bits<uint32_t>(__floats2bfloat162_rn(first, second));
  } else {
    return same_bits<uint32_t>(__floats2half2_rn(first, second));
  }
#else
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
#endif
}

#if !defined(__CUDA_ARCH__)
// The larger of two values; a NaN where one of them is.
template <class T>
uint16_t larger(uint16_t a, uint16_t b) {
  const float x = widen(T{a});
  const float y = widen(T{b});
  if (x != x) return a;
  return x >= y ? a : b;  // a NaN in y fails the comparison
}
#endif

// The larger values of two pairs; a NaN where one of the two is, as in torch's pooling.
template <class T>
RF_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return same_bits<uint32_t>(
        __hmax2_nan(same_bits<__nv_bfloat162>(a), same_bits<__nv_bfloat162>(b)));
  } else {
    return same_bits<uint32_t>(__hmax2_nan(same_bits<__half2>(a), same_bits<__half2>(b)));
  }
#else
  const auto low = [](uint32_t pair) { return static_cast<uint16_t>(pair); };
  const auto high = [](uint32_t pair) { return static_cast<uint16_t>(pair >> 16); };
  return larger<T>(low(a), low(b)) | static_cast<uint32_t>(larger<T>(high(a), high(b))) << 16;
#endif
}

}  // namespace resnet_fused
