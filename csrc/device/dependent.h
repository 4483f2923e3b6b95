// The kernel's side of programmatic dependent launch; launch/flow.h has the rules.
#pragma once

#include <cstdint>

#include "../ptx/grid_dependency.h"
#include "../ptx/memory.h"

namespace resnet_fused {

constexpr int kPrefetchBytes = 128;  // a line of L2

// Waits for the kernel ahead, then lets the next one begin: no sooner, so that no more than one
// kernel sits on the multiprocessors waiting. Every thread comes here, also one that has nothing to
// do, before it touches anything but constants. The wait is in every launch: where nothing is to be
// waited for it is over at once.
RF_DEVICE void wait_for_ahead(bool dependent RF_SITE_PARAMETER) {
  ptx::grid_dependency_wait(RF_SITE_LAST);
  if (dependent) ptx::grid_dependency_launch(RF_SITE_LAST);
}

// Asks for the blocks' shares of a constant of `bytes` to come to L2; nothing waits for it. To be
// called before the wait, where all blocks run at once: later ones find it there.
RF_DEVICE void prefetch_share(const void* constant, int64_t bytes RF_SITE_PARAMETER) {
  const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t step = blocks * blockDim.x * kPrefetchBytes;
  const auto* from = static_cast<const unsigned char*>(constant);
#pragma unroll 1
  for (int64_t at = (block * blockDim.x + threadIdx.x) * kPrefetchBytes; at < bytes; at += step) {
    ptx::prefetch_l2(from + at RF_SITE);
  }
}

}  // namespace resnet_fused
