// Barriers of a block and of a warp. PTX ISA, Parallel Synchronization and Communication
// Instructions: bar, barrier (bar.sync, bar.arrive), bar.warp.sync.
//
// A block has 16 barriers, 0-15. `threads` counts the threads that take part, arriving or waiting:
// a multiple of 32, the same in every call that meets. Barrier 0 is sync_threads's own.
#pragma once

#include "common.h"

namespace resnet_fused::ptx {

// Waits for all threads of the block; what they wrote before is seen behind it.
RF_DEVICE void sync_threads(RF_SITE_ONLY) { asm volatile("bar.sync 0;" ::: "memory"); }

RF_DEVICE void barrier_sync(int id, int threads RF_SITE_PARAMETER) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this thread in without waiting: what a producer does.
RF_DEVICE void barrier_arrive(int id, int threads RF_SITE_PARAMETER) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits for the lanes of `mask`; orders their memory accesses among them.
RF_DEVICE void sync_warp(uint32_t mask = kWholeWarp RF_SITE_PARAMETER) {
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
}

}  // namespace resnet_fused::ptx
