// Additions to global memory that give nothing back, and the pause of a loop that waits for them.
// PTX ISA, red, nanosleep. Scope gpu; an address is a multiple of 4.
#pragma once

#include "atomic.h"

namespace resnet_fused::ptx {

// What this thread wrote before, or knows to be written, is seen by whoever acquires after.
RF_DEVICE void reduce_add_release(uint32_t* at, uint32_t value RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(
      site, "red.release.add.u32",
      {emulator::Fault::kSkip, emulator::Fault::kNonAtomic, emulator::Fault::kNoFence});
  detail::add(site, "red.release.add.u32", at, value, emulator::Ordering::kRelease, fault);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(at)),
               "r"(value)
               : "memory");
#endif
}

// A pause of about so long, at most a millisecond; it orders nothing. Others run meanwhile where
// the loop reads memory, so the emulator has nothing to do.
RF_DEVICE void nanosleep(uint32_t nanoseconds RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  static_cast<void>(nanoseconds);
  emulator::fault_at(site, "nanosleep.u32", {});
#else
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
#endif
}

}  // namespace resnet_fused::ptx
