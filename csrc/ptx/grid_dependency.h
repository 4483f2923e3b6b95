// Programmatic dependent launch: a kernel starts while the one before it in its stream ends.
// PTX ISA, griddepcontrol. sm_90 and later; before it, and in a launch without the attribute,
// both do nothing, because the kernel starts after its predecessor's end anyway. The emulator runs
// launches one after another; in one that has the attribute a thread that has not waited may read
// nothing but constants, and must wait before it leaves.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// Waits until the kernels before have ended and their writes are seen.
RF_DEVICE void grid_dependency_wait(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "griddepcontrol.wait", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::grid_dependency_wait(site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel to start once every block has called this or ended.
RF_DEVICE void grid_dependency_launch(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  emulator::fault_at(site, "griddepcontrol.launch_dependents", {});
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace resnet_fused::ptx
