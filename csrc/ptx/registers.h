// How many registers the threads of a warpgroup have. PTX ISA, setmaxnreg. sm_90a.
//
// A launch gives each thread the same number; warpgroups that need few give some back, those that
// need many then take them. All threads of a warpgroup must call together, and the compiler must
// know the number at the start (__launch_bounds__ with blocks a multiprocessor), or ignores it.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include "../emulator/warpgroup.h"
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RF_HAS_REGISTER_LIMITS

// From now on at most kRegisters a thread; the others are free for other warps.
template <int kRegisters>
RF_DEVICE void decrease_registers(RF_SITE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(RF_EMULATED)
  emulator::limit_registers(site, "setmaxnreg.dec", kRegisters, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Waits until as many are free.
template <int kRegisters>
RF_DEVICE void increase_registers(RF_SITE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(RF_EMULATED)
  emulator::limit_registers(site, "setmaxnreg.inc", kRegisters, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#endif

}  // namespace resnet_fused::ptx
