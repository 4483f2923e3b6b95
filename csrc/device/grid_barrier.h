// Where all blocks of a cooperative launch meet, as often as they like, by one counter in global
// memory; and where some of them meet once, by one of their own.
//
//   GridBarrier barrier(counters, gridDim.x);
//   ... write ...
//   barrier.arrive();  // what the block wrote is on its way to the others
//   ... what needs nothing of theirs: filters of the next layer ...
//   barrier.wait();    // what all blocks wrote before they arrived can be read
//   barrier.leave(bytes);  // once, at the end
//
// Blocks are counted through the whole launch and no counter is reset between two meetings, so that
// a block that is slow to look cannot miss one. Nothing of this is for a launch whose blocks are
// not all on the device at once: those that wait would keep the others out for ever.
#pragma once

#include <cstdint>

#include "../ptx/barrier.h"
#include "../ptx/memory.h"
#include "../ptx/reduce.h"
#include "vector.h"

namespace resnet_fused {

// Between two looks at the counter: short beside the way to L2 and back, long enough that a hundred
// pollers leave the counter's slice of L2 to the arrivals.
constexpr uint32_t kPollNanoseconds = 32;

// Counts this block, of which every thread comes. A release by one thread is one of all that it has
// seen, which the block's barrier makes of what the others wrote.
RF_DEVICE void count_block(uint32_t* counter RF_SITE_PARAMETER) {
  ptx::sync_threads(RF_SITE_LAST);
  if (threadIdx.x == 0) ptx::reduce_add_release(counter, 1u RF_SITE);
}

// Every thread of the block comes, and goes when so many blocks have been counted: what they wrote
// before can be read.
RF_DEVICE void await_blocks(const uint32_t* counter, uint32_t wanted RF_SITE_PARAMETER) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(counter RF_SITE) < wanted) ptx::nanosleep(kPollNanoseconds RF_SITE);
  }
  ptx::sync_threads(RF_SITE_LAST);
}

class GridBarrier {
 public:
  // `counters`: of which the first is this barrier's; zeros before the launch, and again when all
  // blocks have left.
  RF_DEVICE GridBarrier(uint32_t* counters, uint32_t blocks)
      : counters_(counters), blocks_(blocks) {}

  RF_DEVICE void arrive(RF_SITE_ONLY) {
    wanted_ += blocks_;
    count_block(counters_ RF_SITE);
  }

  // Once behind each arrival.
  RF_DEVICE void wait(RF_SITE_ONLY) { await_blocks(counters_, wanted_ RF_SITE); }

  // The last block to come puts the counters back for the next launch: by then all have looked for
  // the last time. `bytes` of them, a multiple of 16; those behind the first are what the kernel
  // has counted with beside.
  RF_DEVICE void leave(int32_t bytes RF_SITE_PARAMETER) {
    if (threadIdx.x != 0) return;
    const uint32_t before = ptx::atomic_add_acq_rel(counters_, 1u RF_SITE);
    if (before + 1 != wanted_ + blocks_) return;
    auto* vectors = reinterpret_cast<Vector<uint32_t>*>(counters_);
#pragma unroll 4
    for (int32_t i = 0; i < bytes / kVectorBytes; ++i) {
      ptx::store_global(vectors + i, Vector<uint32_t> {} RF_SITE);
    }
  }

 private:
  uint32_t* counters_;
  uint32_t blocks_;
  uint32_t wanted_ = 0;  // arrivals that end the meeting at hand
};

}  // namespace resnet_fused
