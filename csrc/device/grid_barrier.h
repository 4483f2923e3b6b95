// Where all blocks of a cooperative launch meet, as often as they like, by one counter in global
// memory.
//
//   GridBarrier barrier(arrivals, gridDim.x);
//   ... write ...
//   barrier.arrive();  // what the block wrote is on its way to the others
//   ... what needs nothing of theirs: filters of the next layer ...
//   barrier.wait();    // what all blocks wrote before they arrived can be read
//   barrier.leave();   // once, at the end
//
// Arrivals are counted through the whole launch and never reset between two meetings, so that a
// block that is slow to look cannot miss one. Nothing of this is for a launch whose blocks are not
// all on the device at once: those that wait would keep the others out for ever.
#pragma once

#include <cstdint>

#include "../ptx/barrier.h"
#include "../ptx/memory.h"
#include "../ptx/reduce.h"

namespace resnet_fused {

// Between two looks at the counter: short beside the way to L2 and back, long enough that a hundred
// pollers leave the counter's slice of L2 to the arrivals.
constexpr uint32_t kPollNanoseconds = 32;

class GridBarrier {
 public:
  // `arrivals`: zero before the launch, and again when all blocks have left.
  RF_DEVICE GridBarrier(uint32_t* arrivals, uint32_t blocks)
      : arrivals_(arrivals), blocks_(blocks) {}

  // Every thread of the block comes. A release by one thread is one of all that it has seen, which
  // the block's barrier makes of what the others wrote.
  RF_DEVICE void arrive(RF_SITE_ONLY) {
    wanted_ += blocks_;
    ptx::sync_threads(RF_SITE_LAST);
    if (threadIdx.x == 0) ptx::reduce_add_release(arrivals_, 1u RF_SITE);
  }

  // Every thread of the block comes, once behind each arrival.
  RF_DEVICE void wait(RF_SITE_ONLY) {
    if (threadIdx.x == 0) {
      while (ptx::load_acquire(arrivals_ RF_SITE) < wanted_)
        ptx::nanosleep(kPollNanoseconds RF_SITE);
    }
    ptx::sync_threads(RF_SITE_LAST);
  }

  // The last block to come puts the counter back for the next launch: by then all have looked for
  // the last time.
  RF_DEVICE void leave(RF_SITE_ONLY) {
    if (threadIdx.x != 0) return;
    const uint32_t before = ptx::atomic_add_acq_rel(arrivals_, 1u RF_SITE);
    if (before + 1 == wanted_ + blocks_) ptx::store_global(arrivals_, 0u RF_SITE);
  }

 private:
  uint32_t* arrivals_;  // [1]
  uint32_t blocks_;
  uint32_t wanted_ = 0;  // arrivals that end the meeting at hand
};

}  // namespace resnet_fused
