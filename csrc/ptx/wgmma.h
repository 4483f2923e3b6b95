// Matrix products of a warpgroup: d = a b, or d += a b, 64 rows by 8 to 256 columns. PTX ISA,
// Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async, wgmma.fence,
// wgmma.commit_group, wgmma.wait_group. sm_90a.
//
// A warpgroup is four warps, of which the first is a multiple of four; all its threads must call
// together, with the same descriptors. Warp w of the four has the rows 16 w to 16 w + 15, with
// g = lane / 4 and t = lane % 4:
//
//   d[4 j + i]      row g + 8 (i / 2), column 8 j + 2 t + i % 2
//   a[4], 16 bits   as mma's m16n8k16: a[0] (row g, columns 2t, 2t+1)  a[1] (g+8, 2t..)  a[2] (g,
//                   2t+8..)  a[3] (g+8, 2t+8..)
//   a[4], TF32      as mma's m16n8k8: a[0] (row g, column t)  a[1] (g+8, t)  a[2] (g, t+4)
//                   a[3] (g+8, t+4)
//   a[4], 8 bits    a[0] (row g, columns 4t to 4t+3)  a[1] (g+8, 4t..)  a[2] (g, 4t+16..)
//                   a[3] (g+8, 4t+16..)
//
// The products run beside the threads, so their registers and their shared memory are not the
// threads' own between the call and the wait:
//
//   wgmma_pin(d);              // and every array of a: accesses of the program stay before it
//   wgmma_fence();             // orders them before the products
//   wgmma<Bf16>(d, a, b, false);
//   wgmma<Bf16>(d, a2, b2, true);  // the same d again needs no fence
//   wgmma_commit_group();
//   wgmma_wait_group<0>();
//   wgmma_pin(d);              // accesses of the program stay behind it
//
// Until the wait, neither d nor an array of a may be touched or go out of scope, nor a byte of the
// operands be written. What threads wrote to shared memory is seen after fence.proxy.async by each
// of them and a barrier behind it.
#pragma once

#include <type_traits>

#include "matrix_descriptor.h"
#include "types.h"
#include "wgmma_operands.h"

namespace resnet_fused::ptx {

// Tags beside Bf16 and F16. Tf32: floats of which the low 13 bits do not count (see to_tf32).
struct Tf32 {};
struct E4m3 {};  // 8 bits: 4 of exponent, 3 of fraction, no infinity

// For an architecture other than sm_90a a call of these is a compile error.
#if defined(RF_EMULATED) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RF_HAS_WGMMA

namespace detail {

template <class T>
struct WgmmaType;
template <>
struct WgmmaType<Bf16> {
  static constexpr char kInstruction[] = "wgmma.bf16";
  static constexpr char kName[] = "k16.f32.bf16.bf16";
  static constexpr int kDepth = 16;
};
template <>
struct WgmmaType<F16> {
  static constexpr char kInstruction[] = "wgmma.f16";
  static constexpr char kName[] = "k16.f32.f16.f16";
  static constexpr int kDepth = 16;
};
template <>
struct WgmmaType<Tf32> {
  static constexpr char kInstruction[] = "wgmma.tf32";
  static constexpr char kName[] = "k8.f32.tf32.tf32";
  static constexpr int kDepth = 8;
};
template <>
struct WgmmaType<E4m3> {
  static constexpr char kInstruction[] = "wgmma.e4m3";
  static constexpr char kName[] = "k32.f32.e4m3.e4m3";
  static constexpr int kDepth = 32;
};

// Only 16-bit elements may lie along M or N (PTX ISA, Shared Memory Matrix Layout).
template <class T>
constexpr bool kMayBeMnMajor = WgmmaType<T>::kDepth == 16;

}  // namespace detail
}  // namespace resnet_fused::ptx

#if defined(RF_EMULATED)
#include "wgmma_emulated.h"
#endif

namespace resnet_fused::ptx {
namespace detail {

#if !defined(RF_EMULATED)

// The operands behind the scales: the majors of those that lie in shared memory.
template <bool kTransposable, Major...>
struct WgmmaMajors {
  static constexpr char kText[] = "";
};
template <Major kA, Major kB>
struct WgmmaMajors<true, kA, kB> {
  static constexpr char kText[] = {
      ',', ' ', '0' + static_cast<int>(kA), ',', ' ', '0' + static_cast<int>(kB), 0};
};
template <Major kB>
struct WgmmaMajors<true, kB> {
  static constexpr char kText[] = {',', ' ', '0' + static_cast<int>(kB), 0};
};

template <int kColumns>
struct Wgmma;

#define RF_WGMMA_PREFIX(N, accumulate, type)       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate \
  ", 0;\n"                                         \
  "wgmma.mma_async.sync.aligned.m64n" #N "%" #type \
  " {" RF_WGMMA_REGISTERS_##N(RF_WGMMA_TEXT, RF_WGMMA_TEXT_COMMA) "}, "

#define RF_WGMMA_SHAPE(N, i, j, k, l, m, n, o, p)                                            \
  template <>                                                                                \
  struct Wgmma<N> {                                                                          \
    template <class Type, class Majors>                                                      \
    static RF_DEVICE void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {   \
      asm volatile(RF_WGMMA_PREFIX(N, k, l) "%" #i ", %" #j ", p, 1, 1%" #m ";\n}\n"         \
                   : RF_WGMMA_REGISTERS_##N(RF_WGMMA_CONSTRAINT, RF_WGMMA_COMMA)             \
                   : "l"(a), "l"(b), "r"(accumulate), "C"(Type::kName), "C"(Majors::kText)); \
    }                                                                                        \
    template <class Type, class Majors>                                                      \
    static RF_DEVICE void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,         \
                              int accumulate) {                                              \
      asm volatile(RF_WGMMA_PREFIX(N, n, o) "{%" #i ", %" #j ", %" #k ", %" #l "}, %" #m     \
                                            ", p, 1, 1%" #p ";\n}\n"                         \
                   : RF_WGMMA_REGISTERS_##N(RF_WGMMA_CONSTRAINT, RF_WGMMA_COMMA)             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),    \
                     "C"(Type::kName), "C"(Majors::kText));                                  \
    }                                                                                        \
  };
RF_WGMMA_SHAPES(RF_WGMMA_SHAPE)
#undef RF_WGMMA_SHAPE
#undef RF_WGMMA_PREFIX

#endif

template <class T, Major kMajorA, Major kMajorB, int kRegisters>
RF_DEVICE constexpr void check_product() {
  static_assert(kRegisters % 4 == 0 && kRegisters >= 4 && kRegisters <= 128,
                "d holds half as many registers as columns: 8 to 256 columns in steps of 8");
  static_assert(kMayBeMnMajor<T> || (kMajorA == Major::kK && kMajorB == Major::kK),
                "only 16-bit operands may lie along M or N");
}

}  // namespace detail

// Both operands in shared memory. T: Bf16, F16 (16 of K), Tf32 (8) or E4m3 (32).
template <class T, Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kRegisters>
RF_DEVICE void wgmma(float (&d)[kRegisters], MatrixDescriptor a, MatrixDescriptor b,
                     bool accumulate RF_SITE_PARAMETER) {
  detail::check_product<T, kMajorA, kMajorB, kRegisters>();
#if defined(RF_EMULATED)
  detail::issue_product<T>(site, {d, kRegisters, nullptr, a.bits, b.bits, accumulate, false, false},
                           kMajorA == Major::kMn, kMajorB == Major::kMn);
#else
  using Majors = detail::WgmmaMajors<detail::kMayBeMnMajor<T>, kMajorA, kMajorB>;
  detail::Wgmma<2 * kRegisters>::template run<detail::WgmmaType<T>, Majors>(d, a.bits, b.bits,
                                                                            accumulate);
#endif
}

// a in registers.
template <class T, Major kMajorB = Major::kK, int kRegisters>
RF_DEVICE void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], MatrixDescriptor b,
                     bool accumulate RF_SITE_PARAMETER) {
  detail::check_product<T, Major::kK, kMajorB, kRegisters>();
#if defined(RF_EMULATED)
  detail::issue_product<T>(site, {d, kRegisters, a, 0, b.bits, accumulate, false, false}, false,
                           kMajorB == Major::kMn);
#else
  using Majors = detail::WgmmaMajors<detail::kMayBeMnMajor<T>, kMajorB>;
  detail::Wgmma<2 * kRegisters>::template run<detail::WgmmaType<T>, Majors>(d, a, b.bits,
                                                                            accumulate);
#endif
}

// Orders the threads' accesses of pinned registers before the products that follow.
RF_DEVICE void wgmma_fence(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "wgmma.fence", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::product_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the warpgroup's products since the last one; it may be empty.
RF_DEVICE void wgmma_commit_group(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "wgmma.commit_group", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::commit_products(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the kPending youngest groups are under way: the others have read their
// operands and written their sums.
template <int kPending>
RF_DEVICE void wgmma_wait_group(RF_SITE_ONLY) {
  static_assert(kPending >= 0);
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "wgmma.wait_group",
                                        {emulator::Fault::kSkip, emulator::Fault::kWaitOneFewer});
  if (fault == emulator::Fault::kSkip) return;
  emulator::wait_products(site, fault == emulator::Fault::kWaitOneFewer ? kPending + 1 : kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// No instruction, but the compiler's accesses of these registers stay on their side of it. Before
// a fence: their values are final. Behind a wait: they may be read. The compiler knows nothing of
// products that run beside the threads.
template <int kRegisters>
RF_DEVICE void wgmma_pin(float (&d)[kRegisters] RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  emulator::pin_registers(site, d, sizeof(d));
#else
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
RF_DEVICE void wgmma_pin(uint32_t (&a)[4] RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  emulator::pin_registers(site, a, sizeof(a));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

#endif

}  // namespace resnet_fused::ptx
