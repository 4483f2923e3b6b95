// Atomics, flags and fences between blocks, all of scope gpu, all on global memory. PTX ISA, Memory
// Consistency Model, and the instructions atom, ld.acquire, st.release, fence. An address is a
// multiple of 4.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include <atomic>
#include <cmath>
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {

using emulator::Access;
using emulator::Fault;
using emulator::Ordering;

// atom.add.f32 on global memory takes subnormal numbers, and gives them, as zeros of their sign.
inline float flush(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
inline float sum(float a, float b) { return flush(flush(a) + flush(b)); }
inline uint32_t sum(uint32_t a, uint32_t b) { return a + b; }

// Blocks of one launch share a host thread, but several host threads may run launches. With
// kNonAtomic others run between the read and the write.
template <class V>
V add(emulator::Site site, const char* name, V* at, V value, Ordering ordering, Fault fault) {
  if (fault == Fault::kSkip) {
    emulator::yield(site, name);  // a loop around it must not hang
    return V{0};
  }
  if (fault == Fault::kNoFence) ordering = Ordering::kRelaxed;
  // Who adds nothing waits for a change: to the runtime that is a load, which lets others run and
  // is no progress, so that a deadlock is seen.
  const bool polls = value == V{0};
  emulator::atomic_point(site, name, at, sizeof(V), polls ? Access::kRead : Access::kAtomic,
                         ordering);
  const std::atomic_ref<V> target(*at);
  V before = target.load(std::memory_order_relaxed);
  if (fault == Fault::kNonAtomic) {
    emulator::yield(site, name);
    target.store(sum(before, value), std::memory_order_relaxed);
    return before;
  }
  // The runtime has told ThreadSanitizer of what comes before; here it learns that the addition
  // itself is released as well.
  const bool releases = ordering == Ordering::kRelease || ordering == Ordering::kAcquireRelease;
  const auto order = releases ? std::memory_order_release : std::memory_order_relaxed;
  while (
      !target.compare_exchange_weak(before, sum(before, value), order, std::memory_order_relaxed)) {
  }
  return before;
}

}  // namespace detail
#endif

// Adds and gives back what was there before; orders nothing else.
RF_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "atom.add.u32",
                                        {emulator::Fault::kSkip, emulator::Fault::kNonAtomic});
  return detail::add(site, "atom.add.u32", at, value, emulator::Ordering::kRelaxed, fault);
#else
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
#endif
}

// The order of the additions, and so the rounding, is nobody's: not for results that must repeat.
RF_DEVICE float atomic_add(float* at, float value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "atom.add.f32",
                                        {emulator::Fault::kSkip, emulator::Fault::kNonAtomic});
  return detail::add(site, "atom.add.f32", at, value, emulator::Ordering::kRelaxed, fault);
#else
  float before;
  asm volatile("atom.relaxed.gpu.global.add.f32 %0, [%1], %2;"
               : "=f"(before)
               : "l"(__cvta_generic_to_global(at)), "f"(value)
               : "memory");
  return before;
#endif
}

// What this thread wrote before is seen by whoever acquires after; and the other way round.
RF_DEVICE uint32_t atomic_add_acq_rel(uint32_t* at, uint32_t value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(
      site, "atom.acq_rel.add.u32",
      {emulator::Fault::kSkip, emulator::Fault::kNonAtomic, emulator::Fault::kNoFence});
  return detail::add(site, "atom.acq_rel.add.u32", at, value, emulator::Ordering::kAcquireRelease,
                     fault);
#else
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
#endif
}

RF_DEVICE uint32_t load_acquire(const uint32_t* from RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "ld.acquire", {emulator::Fault::kNoFence});
  emulator::atomic_point(site, "ld.acquire", from, sizeof(*from), emulator::Access::kRead,
                         fault == emulator::Fault::kNoFence ? emulator::Ordering::kRelaxed
                                                            : emulator::Ordering::kAcquire);
  return std::atomic_ref(*const_cast<uint32_t*>(from)).load(std::memory_order_relaxed);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
#endif
}

RF_DEVICE void store_release(uint32_t* to, uint32_t value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault =
      emulator::fault_at(site, "st.release", {emulator::Fault::kSkip, emulator::Fault::kNoFence});
  if (fault == emulator::Fault::kSkip) return;
  emulator::atomic_point(site, "st.release", to, sizeof(*to), emulator::Access::kWrite,
                         fault == emulator::Fault::kNoFence ? emulator::Ordering::kRelaxed
                                                            : emulator::Ordering::kRelease);
  std::atomic_ref(*to).store(value, std::memory_order_relaxed);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
#endif
}

// Orders this thread's accesses before it against those behind it, as seen from the whole GPU.
RF_DEVICE void fence_acq_rel_gpu(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "fence.acq_rel", {emulator::Fault::kNoFence});
  if (fault != emulator::Fault::kNoFence) emulator::fence(site);
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

}  // namespace resnet_fused::ptx
