// How many cycles blocks take to meet, over and over: all of a launch by a counter in global
// memory, or those of a cluster by its barrier. In a launch that is to be judged each looks, behind
// every meeting, at what its neighbour wrote ahead of it.
#pragma once

#include "../device/ceilings.h"
#include "../device/grid_barrier.h"
#include "../ptx/clock.h"
#include "../ptx/cluster.h"
#include "../ptx/shared.h"

namespace resnet_fused {

enum class Meeting { kGrid, kCluster };

struct CeilingMeetingArguments {
  uint32_t* counters;  // 16 bytes, of which the first four count; zeros, and again behind it
  uint32_t* words;     // [2, blocks], of a grid's neighbours
  int32_t count;
  int32_t looks;    // whether to write and look
  uint32_t* found;  // [blocks]: how often it was the right word
  int64_t* cycles;  // [blocks]
};

template <Meeting kMeeting>
__global__ void __launch_bounds__(kMeetingThreads, 1)
    ceilings_meetings_kernel(const __grid_constant__ CeilingMeetingArguments arguments) {
  constexpr bool kGrid = kMeeting == Meeting::kGrid;
  const uint32_t blocks = kGrid ? gridDim.x : ptx::cluster_blocks();
  const uint32_t block = kGrid ? blockIdx.x : ptx::cluster_rank();
  const uint32_t other = block + 1 == blocks ? 0 : block + 1;
  const ptx::SharedAddress own = ptx::shared_address(ptx::dynamic_shared());
  const bool looks = arguments.looks != 0 && threadIdx.x == 0;
  GridBarrier barrier(arguments.counters, gridDim.x);
  uint32_t found = 0;
  if constexpr (!kGrid) ptx::cluster_sync();  // all have begun
  const int64_t begun = ptx::clock_cycles();
#pragma unroll 1
  for (int32_t i = 0; i < arguments.count; ++i) {
    // Two places by turns: who is a meeting ahead writes beside what is still looked at.
    const uint32_t turn = i & 1;
    const auto first = static_cast<uint32_t>(i + 1) * blocks;  // the words of this meeting
    if constexpr (kGrid) {
      uint32_t* words = arguments.words + turn * blocks;
      if (looks) ptx::store_global(words + block, first + block);
      barrier.arrive();
      barrier.wait();
      if (looks) found += ptx::load_global(words + other) == first + other;
    } else {
      if (looks) ptx::store_shared(own + 4 * turn, first + block);
      ptx::cluster_sync();
      const ptx::SharedAddress at = ptx::cluster_address(own + 4 * turn, other);
      if (looks) found += ptx::load_shared_cluster<uint32_t>(at) == first + other;
    }
  }
  const int64_t ended = ptx::clock_cycles();
  if (threadIdx.x == 0) {
    ptx::store_global(arguments.found + blockIdx.x, found);
    ptx::store_global(arguments.cycles + blockIdx.x, ended - begun);
  }
  if constexpr (kGrid) {
    barrier.leave(kVectorBytes);
  } else {
    ptx::cluster_sync();  // none ends while others look
  }
}

}  // namespace resnet_fused
