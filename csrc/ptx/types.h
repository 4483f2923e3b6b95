// Element types of the matrix instructions, and the words that memory instructions move.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common.h"

namespace resnet_fused::ptx {

// Tags: what the 16-bit halves of a register mean to mma.
struct Bf16 {};  // 8 bits of exponent, 7 of fraction
struct F16 {};   // 5 bits of exponent, 10 of fraction

// The bits of a value of kBytes bytes, as registers hold them.
template <int kBytes>
struct Words {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  uint32_t word[kBytes / 4];
};
template <>
struct Words<1> {
  uint8_t word[1];
};
template <>
struct Words<2> {
  uint16_t word[1];
};

// Whether one instruction moves a V: 1, 2, 4, 8 or 16 bytes without a constructor of their own.
template <class V>
constexpr bool kMovable =
    std::is_trivially_copyable_v<V> &&
    (sizeof(V) == 1 || sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);

}  // namespace resnet_fused::ptx
