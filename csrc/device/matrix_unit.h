// The tensor cores' instruction for each operand type, and the fragments that it takes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/ptx.h"
#include "scalar.h"
#include "tile_shape.h"

namespace resnet_fused {

// d += a b of one slice: 16 x 8 results, kSliceBytes of the reduction. For float the operands are
// rounded to TF32 first, with `round_operands`.
template <class T>
RF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    ptx::mma_m16n8k8_tf32(d, a, b);
  } else {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    using Tag = std::conditional_t<std::is_same_v<T, BFloat16>, ptx::Bf16, ptx::F16>;
    ptx::mma_m16n8k16<Tag>(d, a, b);
  }
}

// Without it the instruction would cut the low bits off, a bias towards zero.
template <class T>
RF_DEVICE void round_operands(uint32_t (&fragment)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& value : fragment) value = ptx::to_tf32(__builtin_bit_cast(float, value));
  }
}
template <class T, int kBlocks>
RF_DEVICE void round_operands(uint32_t (&fragments)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) round_operands<T>(fragments[i]);
}

}  // namespace resnet_fused
