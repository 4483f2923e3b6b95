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

#if defined(RF_EMULATED)
#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>
#endif

#include "types.h"

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;
constexpr uint32_t kTf32Mask = 0xFFFFE000u;      // the bits of a float that TF32 has
constexpr uint32_t kCanonicalNan = 0x7FFFFFFFu;  // the NaN that matrix products return

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

inline float value_of(Bf16, uint32_t bits) { return float_of(bits << 16); }

// Exact: fp16's exponent and fraction are shifted to fp32's places, the biases differ by 112.
inline float value_of(F16, uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const bool finite = magnitude < 0x0F800000u;
  const float value = finite ? float_of(magnitude) * 0x1p112f : float_of(magnitude | 0x7F800000u);
  return float_of(bits_of(value) | (bits & 0x8000u) << 16);
}

// The operands and the sums of one instruction, out of the registers of its lanes.
template <int kDepth>
struct MmaTile {
  float a[kMmaRows][kDepth];
  float b[kDepth][kMmaColumns];
  float d[kMmaRows][kMmaColumns];

  // Products are exact in float: 11 bits by 11 at most.
  void multiply_to_nearest() {
    for (int i = 0; i < kMmaRows; ++i) {
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < kMmaColumns; ++j) d[i][j] += a[i][k] * b[k][j];
      }
    }
  }

  // One rounding an instruction, toward zero, of the sum (in double) of all products and d. A sum
  // beyond the range is infinite, as it is to nearest.
  void multiply_toward_zero() {
    for (int i = 0; i < kMmaRows; ++i) {
      double sum[kMmaColumns];
      for (int j = 0; j < kMmaColumns; ++j) sum[j] = d[i][j];
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < kMmaColumns; ++j) sum[j] += static_cast<double>(a[i][k]) * b[k][j];
      }
      for (int j = 0; j < kMmaColumns; ++j) {
        float result = static_cast<float>(sum[j]);
        if (std::isfinite(result) && std::abs(static_cast<double>(result)) > std::abs(sum[j])) {
          result = float_of(bits_of(result) - 1);
        }
        d[i][j] = result;
      }
    }
  }
};

struct MmaLane {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

// Fetch fills a and b of the tile from one lane's registers.
template <int kDepth, class Fetch>
void multiply(emulator::Site site, const char* name, float (&d)[4], const uint32_t (&a)[4],
              const uint32_t (&b)[2], Fetch fetch) {
  using emulator::Fault;
  const Fault fault = emulator::fault_at(
      site, name, {Fault::kSkip, Fault::kSwapOperands, Fault::kStaleAccumulator, Fault::kTruncate});
  if (fault == Fault::kSkip) return;
  MmaLane mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  if (fault == Fault::kSwapOperands) std::swap(mine.a[1], mine.a[2]);
  if (fault == Fault::kStaleAccumulator) std::fill(mine.d, mine.d + 4, 0.0f);
  emulator::collective(site, name, kWholeWarp, &mine, [fetch](void* const* lanes) {
    MmaTile<kDepth> tile;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto& from = *static_cast<const MmaLane*>(lanes[lane]);
      const int g = lane / 4;
      const int t = lane % 4;
      fetch(tile, from, g, t);
      for (int i = 0; i < 4; ++i) tile.d[g + 8 * (i / 2)][2 * t + i % 2] = from.d[i];
    }
    if (emulator::schedule().rounding == emulator::Rounding::kTowardZero) {
      tile.multiply_toward_zero();
    } else {
      tile.multiply_to_nearest();
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto& to = *static_cast<MmaLane*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const float sum = tile.d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
        to.d[i] = std::isnan(sum) ? float_of(kCanonicalNan) : sum;
      }
    }
  });
  for (int i = 0; i < 4; ++i) {
    // As if the sums were kept in 16 bits.
    d[i] = fault == Fault::kTruncate ? float_of(bits_of(mine.d[i]) & 0xFFFF0000u) : mine.d[i];
  }
}

template <class T>
void multiply_16_bits(emulator::Site site, const char* name, float (&d)[4], const uint32_t (&a)[4],
                      const uint32_t (&b)[2]) {
  multiply<16>(site, name, d, a, b, [](MmaTile<16>& tile, const MmaLane& from, int g, int t) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = from.a[i] >> 16 * half & 0xFFFFu;
        tile.a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = value_of(T{}, bits);
      }
      for (int i = 0; i < 2; ++i) {
        const uint32_t bits = from.b[i] >> 16 * half & 0xFFFFu;
        tile.b[2 * t + half + 8 * i][g] = value_of(T{}, bits);
      }
    }
  });
}

}  // namespace detail
#endif

template <class T>
RF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2] RF_SITE_PARAMETER) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>, "T is ptx::Bf16 or ptx::F16");
#if defined(RF_EMULATED)
  constexpr const char* kName = std::is_same_v<T, Bf16> ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
  detail::multiply_16_bits<T>(site, kName, d, a, b);
#else
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
#endif
}

// a and b hold floats in TF32: the low 13 bits of the fraction do not count (see to_tf32).
RF_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2] RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::multiply<8>(site, "mma.m16n8k8.tf32", d, a, b,
                      [](detail::MmaTile<8>& tile, const detail::MmaLane& from, int g, int t) {
                        for (int i = 0; i < 4; ++i) {
                          const uint32_t bits = from.a[i] & detail::kTf32Mask;
                          tile.a[g + 8 * (i % 2)][t + 4 * (i / 2)] = detail::float_of(bits);
                        }
                        for (int i = 0; i < 2; ++i) {
                          tile.b[t + 4 * i][g] = detail::float_of(from.b[i] & detail::kTf32Mask);
                        }
                      });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// float -> TF32, to nearest, ties away from zero; the low 13 bits are zeros. PTX ISA,
// cvt.rna.tf32.f32, which leaves TF32's bits to the implementation: on sm_80 to sm_100 it is an
// addition and a mask, so that a NaN whose payload lies in the low 13 bits alone becomes an
// infinity.
RF_DEVICE uint32_t to_tf32(float value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const uint32_t bits = detail::bits_of(value);
  const auto fault = emulator::fault_at(site, "cvt.rna.tf32", {emulator::Fault::kTruncate});
  const bool rounds = std::isfinite(value) && fault != emulator::Fault::kTruncate;
  return (bits + (rounds ? 0x1000u : 0u)) & detail::kTf32Mask;  // half of the last place kept
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

}  // namespace resnet_fused::ptx
