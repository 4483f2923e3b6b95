// What a ReLU has passed, of two elements at once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pair.h"

namespace resnet_fused {

// All bits of each half of a word that holds what a ReLU has passed: not (value > 0), so that NaN
// keeps its gradient.
template <class T>
RF_DEVICE uint32_t passed_pair(uint32_t word) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __hgtu2_mask(same_bits<__nv_bfloat162>(word), same_bits<__nv_bfloat162>(0u));
  } else {
    return __hgtu2_mask(same_bits<__half2>(word), same_bits<__half2>(0u));
  }
#else
  const auto half = [](uint32_t bits) -> uint32_t {
    return widen(T{static_cast<uint16_t>(bits)}) <= 0.0f ? 0u : 0xFFFFu;
  };
  return half(word) | half(word >> 16) << 16;
#endif
}

}  // namespace resnet_fused
