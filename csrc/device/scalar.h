// Storage types and their conversions, the same bits on host and device.
//
// Widening is exact. Narrowing rounds to nearest, ties to even, keeps subnormals, overflows to
// infinity and maps every NaN to a quiet NaN. On the device the conversion instructions do exactly
// this; on the host it is written out, free of branches, so that the compiler vectorises it.
#pragma once

#include <cstdint>

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

RF_NAMESPACE_BEGIN

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type that arithmetic on a storage type runs in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

namespace scalar {

RF_HOST_DEVICE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
RF_HOST_DEVICE float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr uint32_t kFloatInfinity = 0x7F800000u;
constexpr uint32_t kExponentGap = (127u - 15u) << 23;  // between the biases of float and half
constexpr uint32_t kSmallestNormalHalf = (127u - 14u) << 23;
constexpr uint32_t kHalfOverflow = (127u + 16u) << 23;  // 2^16: infinity whatever the mantissa
constexpr uint32_t kSubnormalMagic = (127u - 14u + 13u) << 23;  // its ulp is half's 2^-24

RF_HOST_DEVICE float widen_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + kExponentGap;
  const uint32_t special = normal + kExponentGap;  // exponent 31 becomes 255
  // 2^-14 (1 + m) - 2^-14: exact, and no operand is subnormal, so a CPU that flushes them is right.
  const uint32_t subnormal =
      bits_of(from_bits(magnitude + kSmallestNormalHalf) - from_bits(kSmallestNormalHalf));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  const uint32_t result = magnitude >= (31u << 23) ? special : finite;
  return from_bits(result | static_cast<uint32_t>(half & 0x8000u) << 16);
}

RF_HOST_DEVICE uint16_t narrow_to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - kExponentGap + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  // Adding the magic number makes the float adder round at half's subnormal step. The operand is
  // capped first, so that the unused lane of a vector computes nothing strange.
  const float small = from_bits(magnitude < kSmallestNormalHalf ? magnitude : 0u);
  const uint32_t subnormal = bits_of(small + from_bits(kSubnormalMagic)) - kSubnormalMagic;
  const uint32_t special = magnitude > kFloatInfinity ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < kSmallestNormalHalf ? subnormal : normal;
  const uint32_t result = magnitude >= kHalfOverflow ? special : finite;
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

RF_HOST_DEVICE uint16_t narrow_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > kFloatInfinity ? quiet : rounded);
}

}  // namespace scalar

RF_HOST_DEVICE float widen(float value) { return value; }
RF_HOST_DEVICE double widen(double value) { return value; }
RF_HOST_DEVICE float widen(BFloat16 value) {
  return scalar::from_bits(static_cast<uint32_t>(value.bits) << 16);
}
RF_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return scalar::widen_half(value.bits);
#endif
}

template <class T>
RF_HOST_DEVICE T narrow(Compute<T> value);
template <>
RF_HOST_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
RF_HOST_DEVICE double narrow<double>(double value) {
  return value;
}
template <>
RF_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return {scalar::narrow_to_bfloat16(value)};
#endif
}
template <>
RF_HOST_DEVICE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return {scalar::narrow_to_half(value)};
#endif
}

RF_NAMESPACE_END
