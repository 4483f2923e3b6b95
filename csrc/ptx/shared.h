// Dynamic shared memory and its addresses.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// The block's dynamic shared memory; as many bytes as the launch asked for, aligned to 1024 (what
// a 128-byte swizzle needs). Kernels have no other shared memory.
RF_DEVICE unsigned char* dynamic_shared() {
#if defined(RF_EMULATED)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(1024) unsigned char rf_dynamic_shared[];
  return rf_dynamic_shared;
#endif
}

// The address in the shared window of a pointer into dynamic_shared(): what the instructions take.
// PTX ISA, cvta.
RF_DEVICE SharedAddress shared_address(const void* pointer) {
#if defined(RF_EMULATED)
  return emulator::shared_address(pointer);
#else
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace resnet_fused::ptx
