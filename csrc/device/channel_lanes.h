// A warpgroup whose sums have channels as rows: the lanes that hold one channel, and the threads
// that merge what is left of 64.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// Those who merge sums (merge_chunks.h): a warpgroup, whose number is its named barrier's.
template <int kColumns = kWarpgroupRows>
struct MergingWarpgroup {
  static constexpr int kThreads = kWarpgroupThreads;
  static constexpr int kN = kColumns;
  static RF_DEVICE void meet() {
    ptx::barrier_sync(static_cast<int>(threadIdx.x / kWarpgroupThreads), kWarpgroupThreads);
  }
};

// The sum over the four lanes that hold a channel, in each of them.
RF_DEVICE float sum_of_channel(float value) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    value += ptx::shuffle_xor(ptx::kWholeWarp, value, lanes);
  }
  return value;
}

}  // namespace resnet_fused
