// Barriers of a block and of a warp. PTX ISA, Parallel Synchronization and Communication
// Instructions: bar, barrier (bar.sync, bar.arrive), bar.warp.sync.
//
// A block has 16 barriers, 0-15. `threads` counts the threads that take part, arriving or waiting:
// a multiple of 32, the same in every call that meets. Barrier 0 is sync_threads's own.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include <string>
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {

constexpr int kBarriers = 16;
constexpr int kEveryThread = 0;  // the runtime's word for bar.sync without a count

inline void named_barrier(emulator::Site site, const char* name, int id, int threads, bool wait) {
  if (id < 0 || id >= kBarriers) {
    emulator::fail(site, name, "barrier " + std::to_string(id) + " (a block has 0 to 15)");
  }
  const int block = static_cast<int>(emulator::this_thread().block_size.count());
  const int whole_warps = (block + kWarpSize - 1) / kWarpSize * kWarpSize;
  if (threads <= 0 || threads % kWarpSize != 0 || threads > whole_warps) {
    emulator::fail(site, name,
                   std::to_string(threads) + " threads (a multiple of 32, at most the block's " +
                       std::to_string(whole_warps) + ")");
  }
  switch (emulator::fault_at(
      site, name,
      {emulator::Fault::kSkip, emulator::Fault::kWrongBarrier, emulator::Fault::kWrongCount})) {
    case emulator::Fault::kSkip:
      return;
    case emulator::Fault::kWrongBarrier:
      // Not all threads alike: a barrier that everybody mistakes for another one works.
      if (emulator::warp() % 2 != 0) id ^= 1;
      break;
    case emulator::Fault::kWrongCount:
      threads = threads > kWarpSize ? threads - kWarpSize : threads + kWarpSize;
      break;
    default:
      break;
  }
  emulator::barrier(site, id, threads, wait);
}

}  // namespace detail
#endif

// Waits for all threads of the block; what they wrote before is seen behind it.
RF_DEVICE void sync_threads(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "bar.sync 0",
                                        {emulator::Fault::kSkip, emulator::Fault::kWrongBarrier});
  if (fault == emulator::Fault::kSkip) return;
  const bool wrong = fault == emulator::Fault::kWrongBarrier && emulator::warp() % 2 != 0;
  emulator::barrier(site, wrong ? 1 : 0, detail::kEveryThread, true);
#else
  asm volatile("bar.sync 0;" ::: "memory");
#endif
}

RF_DEVICE void barrier_sync(int id, int threads RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::named_barrier(site, "bar.sync", id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts this thread in without waiting: what a producer does.
RF_DEVICE void barrier_arrive(int id, int threads RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::named_barrier(site, "bar.arrive", id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Waits for the lanes of `mask`; orders their memory accesses among them.
RF_DEVICE void sync_warp(uint32_t mask = kWholeWarp RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "bar.warp.sync", {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return;
  if ((mask >> emulator::lane() & 1u) == 0) {
    emulator::fail(site, "bar.warp.sync",
                   "the calling lane is not in the mask " + emulator::hex(mask));
  }
  emulator::warp_barrier(site, mask);
#else
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
#endif
}

}  // namespace resnet_fused::ptx
