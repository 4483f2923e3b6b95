// e4m3 in storage: 4 bits of exponent, 3 of fraction, no infinity ("FP8 Formats for Deep Learning",
// Micikevicius et al., 2022, section 3). Pairs of it and floats, the same bits on host and device.
//
// Widening is exact. Narrowing rounds to nearest, ties to even, keeps subnormals, saturates at 448
// and maps every NaN to a NaN.
#pragma once

#include <cstdint>

#include "../ptx/common.h"
#include "pair.h"
#include "scalar.h"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

// Conversions are instructions from sm_89 on; for what is older nothing is made of them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define RF_CONVERTS_E4M3
#endif

namespace resnet_fused {

struct Float8E4M3 {
  uint8_t bits;
};

#if defined(RF_CONVERTS_E4M3)

constexpr bool kConvertsE4M3 = true;

#if !defined(__CUDA_ARCH__)

constexpr uint32_t kE4M3Nan = 0x7F;
constexpr uint32_t kE4M3Largest = 0x7E;  // 448

inline float widen(Float8E4M3 value) {
  const uint32_t magnitude = value.bits & 0x7Fu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
  if (magnitude == kE4M3Nan) return scalar::from_bits(sign | 0x7FC00000u);
  constexpr uint32_t kExponentGap = (127u - 7u) << 23;                  // between the biases
  const float smallest = scalar::from_bits(kExponentGap + (1u << 23));  // 2^-6
  // 2^-6 (1 + m) - 2^-6 for what is subnormal: exact.
  const float finite =
      magnitude < 8 ? scalar::from_bits((magnitude << 20) + kExponentGap + (1u << 23)) - smallest
                    : scalar::from_bits((magnitude << 20) + kExponentGap);
  return scalar::from_bits(scalar::bits_of(finite) | sign);
}

inline uint8_t narrow_to_e4m3(float value) {
  const uint32_t bits = scalar::bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  constexpr uint32_t kExponentGap = (127u - 7u) << 23;
  constexpr uint32_t kSmallestNormal = (127u - 6u) << 23;
  constexpr uint32_t kSubnormalMagic = (127u - 9u + 23u) << 23;  // its ulp is e4m3's 2^-9
  constexpr uint32_t k448 = (127u + 8u) << 23 | 6u << 20;
  uint32_t found = kE4M3Largest;
  if (magnitude > scalar::kFloatInfinity) {
    found = kE4M3Nan;
  } else if (magnitude < kSmallestNormal) {
    const float sum = scalar::from_bits(magnitude) + scalar::from_bits(kSubnormalMagic);
    found = scalar::bits_of(sum) - kSubnormalMagic;
  } else if (magnitude < k448) {
    found = (magnitude - kExponentGap + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20;
  }
  return static_cast<uint8_t>(found | (bits >> 24 & 0x80u));
}

#endif

// Two bytes as two halves, which hold every number of e4m3, the lower one in the lower half.
RF_DEVICE uint32_t e4m3_to_half_pair(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  const auto bits = static_cast<__nv_fp8x2_storage_t>(pair);
  return same_bits<uint32_t>(__nv_cvt_fp8x2_to_halfraw2(bits, __NV_E4M3));
#else
  return narrow_pair<Float16>(widen(Float8E4M3{static_cast<uint8_t>(pair)}),
                              widen(Float8E4M3{static_cast<uint8_t>(pair >> 8)}));
#endif
}
// Of two bytes, `low` in the lower one.
RF_DEVICE FloatPair widen_e4m3_pair(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  const float2 values = __half22float2(same_bits<__half2>(e4m3_to_half_pair(pair)));
  return {values.x, values.y};
#else
  return {widen(Float8E4M3{static_cast<uint8_t>(pair)}),
          widen(Float8E4M3{static_cast<uint8_t>(pair >> 8)})};
#endif
}
RF_DEVICE uint32_t narrow_e4m3_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
  return narrow_to_e4m3(low) | static_cast<uint32_t>(narrow_to_e4m3(high)) << 8;
#endif
}
RF_DEVICE uint32_t half_to_e4m3_pair(uint32_t halves) {
#if defined(__CUDA_ARCH__)
  return __nv_cvt_halfraw2_to_fp8x2(same_bits<__half2_raw>(halves), __NV_SATFINITE, __NV_E4M3);
#else
  return narrow_e4m3_pair(widen(Float16{static_cast<uint16_t>(halves)}),
                          widen(Float16{static_cast<uint16_t>(halves >> 16)}));
#endif
}

#else
constexpr bool kConvertsE4M3 = false;
#endif

}  // namespace resnet_fused
