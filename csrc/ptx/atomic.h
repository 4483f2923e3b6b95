// Atomics, flags and fences between blocks, all of scope gpu, all on global memory. PTX ISA, Memory
// Consistency Model, and the instructions atom, ld.acquire, st.release, fence. An address is a
// multiple of 4.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// Adds and gives back what was there before; orders nothing else.
RF_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value RF_SITE_PARAMETER) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
}

// The order of the additions, and so the rounding, is nobody's: not for results that must repeat.
RF_DEVICE float atomic_add(float* at, float value RF_SITE_PARAMETER) {
  float before;
  asm volatile("atom.relaxed.gpu.global.add.f32 %0, [%1], %2;"
               : "=f"(before)
               : "l"(__cvta_generic_to_global(at)), "f"(value)
               : "memory");
  return before;
}

// What this thread wrote before is seen by whoever acquires after; and the other way round.
RF_DEVICE uint32_t atomic_add_acq_rel(uint32_t* at, uint32_t value RF_SITE_PARAMETER) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(at)), "r"(value)
               : "memory");
  return before;
}

RF_DEVICE uint32_t load_acquire(const uint32_t* from RF_SITE_PARAMETER) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
}

RF_DEVICE void store_release(uint32_t* to, uint32_t value RF_SITE_PARAMETER) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value)
               : "memory");
}

// Orders this thread's accesses before it against those behind it, as seen from the whole GPU.
RF_DEVICE void fence_acq_rel_gpu(RF_SITE_ONLY) { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace resnet_fused::ptx
