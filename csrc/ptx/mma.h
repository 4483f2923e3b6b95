// Matrix products of a warp: d += a b. PTX ISA, Warp-level Matrix Instructions: mma, and its Matrix
// Fragments for mma.m16n8k16 (floating point) and mma.m16n8k8. sm_80 and later.
//
// With g = lane / 4 and t = lane % 4, a lane holds (a pair: the lower half of a register first)
//   m16n8k16  a[0] (row g, columns 2t, 2t+1)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8,
//   2t+8..)
//             b[0] (rows 2t, 2t+1, column g)  b[1] (rows 2t+8, 2t+9, column g)
//   m16n8k8   a[0] (row g, column t)  a[1] (g+8, t)  a[2] (g, t+4)  a[3] (g+8, t+4)
//             b[0] (row t, column g)  b[1] (row t+4, column g)
//   both      d[0], d[1] (row g, columns 2t, 2t+1)  d[2], d[3] (row g+8, columns 2t, 2t+1)
#pragma once

#include <type_traits>

#include "types.h"

namespace resnet_fused::ptx {

template <class T>
RF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2] RF_SITE_PARAMETER) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>, "T is ptx::Bf16 or ptx::F16");
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// a and b hold floats in TF32: the low 13 bits of the fraction do not count (see to_tf32).
RF_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2] RF_SITE_PARAMETER) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float -> TF32, to nearest, ties away from zero. PTX ISA, cvt.rna.tf32.f32. sm_80 and later.
RF_DEVICE uint32_t to_tf32(float value RF_SITE_PARAMETER) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

}  // namespace resnet_fused::ptx
