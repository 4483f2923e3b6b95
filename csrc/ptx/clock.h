// A multiprocessor's clock. PTX ISA, Special Registers: %clock64.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// Cycles since some moment, the same for all threads of a multiprocessor; memory accesses of the
// program stay on their side of it. The emulator has no time: 0.
RF_DEVICE int64_t clock_cycles() {
#if defined(RF_EMULATED)
  return 0;
#else
  int64_t cycles;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles)::"memory");
  return cycles;
#endif
}

}  // namespace resnet_fused::ptx
