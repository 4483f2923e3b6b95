// Asynchronous copies from global to shared memory, and the groups that wait for them.
// PTX ISA, Data Movement and Conversion Instructions: cp.async, cp.async.commit_group,
// cp.async.wait_group, cp.async.wait_all. sm_80 and later.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include <cstring>
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {
// Each byte that a copy without its mask finds: 48.5 in bf16, 3.1 in fp16, 48.6 in fp32; never a
// NaN, which any test would notice.
inline constexpr int kBeyondTensor = 0x42;
}  // namespace detail
#endif

// Copies kBytes from `from` (global) to `to` (shared), both multiples of kBytes; not `valid`:
// writes zeros and does not read `from`. What it writes may be read by this thread after a wait for
// its group, by others after a barrier behind that wait. 16 bytes bypass L1 (.cg, which allows no
// other size), 4 and 8 go through it (.ca).
template <int kBytes>
RF_DEVICE void cp_async(SharedAddress to, const void* from, bool valid RF_SITE_PARAMETER) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(RF_EMULATED)
  constexpr const char* kName = kBytes == 16 ? "cp.async.cg" : "cp.async.ca";
  switch (emulator::fault_at(site, kName,
                             {emulator::Fault::kSkip, emulator::Fault::kIgnorePredicate,
                              emulator::Fault::kRowOff, emulator::Fault::kChunkOff})) {
    case emulator::Fault::kSkip:
      return;
    case emulator::Fault::kIgnorePredicate:
      if (valid) break;
      // An address beyond every tensor is noticed where the session knows the tensors. What lies
      // there may not be mapped, so the values are made up.
      if (emulator::current_session != nullptr && emulator::current_session->checking_tensors) {
        emulator::global(site, kName, from, kBytes, kBytes, emulator::Access::kRead);
      }
      std::memset(emulator::shared(site, kName, to, kBytes, kBytes, emulator::Access::kWrite),
                  detail::kBeyondTensor, kBytes);
      return;
    case emulator::Fault::kRowOff:
      to += kBytes * kWarpSize;
      break;
    case emulator::Fault::kChunkOff:
      to ^= 16;
      break;
    default:
      break;
  }
  emulator::copy_async(site, to, from, kBytes, valid ? kBytes : 0);
#else
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
#endif
}

// Closes the group of this thread's copies since the last one; it may be empty.
RF_DEVICE void cp_async_commit_group(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "cp.async.commit_group", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::commit_group(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending youngest groups of this thread are under way.
template <int kPending>
RF_DEVICE void cp_async_wait_group(RF_SITE_ONLY) {
  static_assert(kPending >= 0);
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "cp.async.wait_group",
                                        {emulator::Fault::kSkip, emulator::Fault::kWaitOneFewer});
  if (fault == emulator::Fault::kSkip) return;
  emulator::wait_group(site, fault == emulator::Fault::kWaitOneFewer ? kPending + 1 : kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all copies of this thread, committed or not.
RF_DEVICE void cp_async_wait_all(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "cp.async.wait_all", {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return;
  emulator::commit_group(site);
  emulator::wait_group(site, 0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace resnet_fused::ptx
