// Operand tiles of wgmma as TMA writes them, and the products of one step over them.
//
// A tile [rows][128 bytes]: rows lie along the reduction, 64 elements of 16 bits or 128 of 8, with
// the swizzle of 128 bytes; it begins at a multiple of 1024, and so does every part of it that
// begins at a multiple of eight rows. Each warpgroup multiplies 64 rows of its left tile by all
// kColumns rows of the right one.
//
//   float d[kColumns / 2];
//   clear(d);                                    // once, so that they are defined
//   ptx::wgmma_pin(d);                           // before the first step of every sum
//   for each step:
//     ring.wait(at);                             // pipeline.h
//     ptx::wgmma_fence();
//     multiply_step<T>(d, left, right, step > 0);
//     ptx::wgmma_commit_group();
//     ptx::wgmma_wait_group<1>();                // the step before has been read: release it
//   ptx::wgmma_wait_group<0>();
//   ptx::wgmma_pin(d);                           // d may be read
//
// The layout of d is in csrc/ptx/wgmma.h's head. All of it must be inlined into the kernel: ptxas
// lets products that cross a call wait for one another.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/wgmma.h"
#include "scalar.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Rows of 128 bytes or 64, with a swizzle as wide; eight of them are whole patterns of it.
template <int kRowBytes>
constexpr ptx::MatrixLayout kTileLayout{
    kRowBytes == 128 ? ptx::Swizzle::k128Bytes : ptx::Swizzle::k64Bytes, 0, 8 * kRowBytes};
static_assert(kTileLayout<128>.valid() && kTileLayout<64>.valid());

// What wgmma calls a storage type. quantised_epilogue.h has one more.
template <class T>
struct ProductOf;
template <>
struct ProductOf<BFloat16> {
  using type = ptx::Bf16;
};
template <>
struct ProductOf<Float16> {
  using type = ptx::F16;
};
template <class T>
using ProductType = typename ProductOf<T>::type;

constexpr int kProductBytes = 32;                         // of a row that an instruction takes
constexpr int kProducts = kStepRowBytes / kProductBytes;  // instructions in a step

template <int kRegisters>
RF_DEVICE void clear(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) d[i] = 0.0f;
}

// d = left right^T of one step, or d += it. `left`, `right`: where the warpgroup's rows begin. The
// caller fences before and commits behind. kRowBytes: 128, or 64 where a tap has no more.
template <class T, int kRowBytes = kStepRowBytes, int kRegisters>
RF_DEVICE void multiply_step(float (&d)[kRegisters], ptx::SharedAddress left,
                             ptx::SharedAddress right, bool accumulate) {
  const auto a = ptx::matrix_descriptor(left, kTileLayout<kRowBytes>);
  const auto b = ptx::matrix_descriptor(right, kTileLayout<kRowBytes>);
#pragma unroll
  for (int i = 0; i < kRowBytes / kProductBytes; ++i) {
    ptx::wgmma<ProductType<T>>(d, a + i * kProductBytes, b + i * kProductBytes,
                               accumulate || i > 0);
  }
}

// The same with the left side in registers, as a[4] of each instruction. They are pinned before
// the fence, and are the products' until those have been waited for.
template <class T, int kRegisters>
RF_DEVICE void multiply_step(float (&d)[kRegisters], const uint32_t (&left)[kProducts][4],
                             ptx::SharedAddress right, bool accumulate) {
  const auto b = ptx::matrix_descriptor(right, kTileLayout<kStepRowBytes>);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    ptx::wgmma<ProductType<T>>(d, left[i], b + i * kProductBytes, accumulate || i > 0);
  }
}

// A right tile [64 of the reduction][columns] as filters lie in memory: boxes of 64 columns behind
// one another, in each of which a row of the reduction is a row of 128 bytes.
constexpr int kAcrossBoxBytes = kStepElements * kStepRowBytes;
constexpr ptx::MatrixLayout kAcrossLayout{ptx::Swizzle::k128Bytes, kAcrossBoxBytes,
                                          8 * kStepRowBytes};
static_assert(kAcrossLayout.valid());

// d = left right or d += it, with the left side in registers as above.
template <class T, int kRegisters>
RF_DEVICE void multiply_across(float (&d)[kRegisters], const uint32_t (&left)[kProducts][4],
                               ptx::SharedAddress right, bool accumulate) {
  constexpr int kRows = kStepElements / kProducts;  // of the reduction, that an instruction takes
  const auto b = ptx::matrix_descriptor(right, kAcrossLayout);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    ptx::wgmma<ProductType<T>, ptx::Major::kMn>(d, left[i], b + i * kRows * kStepRowBytes,
                                                accumulate || i > 0);
  }
}

#endif

}  // namespace resnet_fused
