// Asynchronous copies from global to shared memory, and the groups that wait for them.
// PTX ISA, Data Movement and Conversion Instructions: cp.async, cp.async.commit_group,
// cp.async.wait_group, cp.async.wait_all. sm_80 and later.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// Copies kBytes from `from` (global) to `to` (shared), both multiples of kBytes; not `valid`:
// writes zeros and does not read `from`. What it writes may be read by this thread after a wait for
// its group, by others after a barrier behind that wait. 16 bytes bypass L1 (.cg, which allows no
// other size), 4 and 8 go through it (.ca).
template <int kBytes>
RF_DEVICE void cp_async(SharedAddress to, const void* from, bool valid RF_SITE_PARAMETER) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int read = valid ? kBytes : 0;  // src-size: bytes read; the others are zeros
  const uint64_t global = __cvta_generic_to_global(from);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(read)
                 : "memory");
  }
}

// Closes the group of this thread's copies since the last one; it may be empty.
RF_DEVICE void cp_async_commit_group(RF_SITE_ONLY) {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the kPending youngest groups of this thread are under way.
template <int kPending>
RF_DEVICE void cp_async_wait_group(RF_SITE_ONLY) {
  static_assert(kPending >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for all copies of this thread, committed or not.
RF_DEVICE void cp_async_wait_all(RF_SITE_ONLY) { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace resnet_fused::ptx
