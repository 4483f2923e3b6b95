// How many bytes a cycle TMA brings to every multiprocessor: boxes of a set, as rows of a tensor or
// in one piece, by each block for itself or in parts for all blocks of its cluster. Four warps wait
// for each box, and in a launch that is to be judged add up what it holds.
#pragma once

#include "../device/ceiling_path.h"
#include "../device/pipeline.h"
#include "../ptx/barrier.h"
#include "../ptx/clock.h"
#include "../ptx/memory.h"
#include "../ptx/shared.h"
#include "../ptx/tma.h"

namespace resnet_fused {

enum class Brought { kRows, kPiece };  // cp.async.bulk.tensor, cp.async.bulk

struct CeilingReadArguments {
  ptx::TensorMap rows;  // boxes of kCeilingBoxRows / kSharing rows
  const unsigned char* set;
  CeilingPath path;
  int32_t sums;     // whether to add up
  uint32_t* sum;    // [blocks, kReaderThreads]
  int64_t* cycles;  // [blocks]
};

// Threads read here what others' copies brought, so that arrivals release it to them.
template <int kSharing>
struct ReadRing : Ring<kReadStages, kSharing> {
  using Place = RingPlace<kReadStages>;

  RF_DEVICE void acquire(const Place& at) const {
    if constexpr (kSharing > 1) {
      ptx::mbarrier_wait_parity_cluster(this->empty(at), at.parity ^ 1);
    } else {
      ptx::mbarrier_wait_parity(this->empty(at), at.parity ^ 1);
    }
    ptx::mbarrier_arrive_expect_tx(this->full(at), kCeilingBoxBytes);
  }
  // The first kSharing lanes of a warp.
  RF_DEVICE void release(const Place& at) const {
    if constexpr (kSharing > 1) {
      ptx::mbarrier_arrive_cluster(ptx::cluster_address(this->empty(at), threadIdx.x % 32));
    } else {
      ptx::mbarrier_arrive(this->empty(at));
    }
  }
};

template <Brought kBrought, int kSharing>
RF_DEVICE void ask_for_boxes(const CeilingReadArguments& arguments, const ReadRing<kSharing>& ring,
                             ptx::SharedAddress stages) {
  static_assert(kBrought == Brought::kRows || kSharing == 1);
  constexpr int32_t kRows = kCeilingBoxRows / kSharing;
  CeilingWalk walk(arguments.path);
  RingPlace<kReadStages> at;
  const auto part = static_cast<int32_t>(kSharing > 1 ? ptx::cluster_rank() : 0) * kRows;
#pragma unroll 1
  for (int32_t i = 0; i < arguments.path.count; ++i, walk.next(), at.next()) {
    const ptx::SharedAddress stage = stages + at.stage * kCeilingBoxBytes;
    ring.acquire(at);
    if constexpr (kBrought == Brought::kPiece) {
      ptx::bulk_load(stage, arguments.set + int64_t{walk.box()} * kCeilingBoxBytes,
                     kCeilingBoxBytes, ring.full(at));
    } else if constexpr (kSharing > 1) {
      ptx::tma_load_multicast(stage + part * kStepRowBytes, &arguments.rows,
                              {0, walk.box() * kCeilingBoxRows + part}, ring.full(at),
                              (1 << kSharing) - 1);
    } else {
      ptx::tma_load(stage, &arguments.rows, {0, walk.box() * kCeilingBoxRows}, ring.full(at));
    }
  }
}

template <Brought kBrought, int kSharing>
__global__ void __launch_bounds__(kReadThreads, 1)
    ceilings_reads_kernel(const __grid_constant__ CeilingReadArguments arguments) {
  const ptx::SharedAddress stages = ptx::shared_address(ptx::dynamic_shared());
  const ReadRing<kSharing> ring{{stages + kReadStages * kCeilingBoxBytes}};
  if (threadIdx.x == kReaderThreads) {
    if constexpr (kBrought == Brought::kRows) ptx::tma_prefetch(&arguments.rows);
    ring.init(kReaderThreads / 32);
    ptx::fence_mbarrier_init();
  }
  if constexpr (kSharing > 1) {
    ptx::cluster_sync();
  } else {
    ptx::sync_threads();
  }
  if (threadIdx.x == kReaderThreads) {
    ask_for_boxes<kBrought, kSharing>(arguments, ring, stages);
  } else if (threadIdx.x < kReaderThreads) {
    const int64_t begun = ptx::clock_cycles();
    uint32_t sum = 0;
    RingPlace<kReadStages> at;
#pragma unroll 1
    for (int32_t i = 0; i < arguments.path.count; ++i, at.next()) {
      ring.wait(at);
      if (arguments.sums != 0) {
        const ptx::SharedAddress box = stages + at.stage * kCeilingBoxBytes;
        for (uint32_t piece = threadIdx.x; piece < kCeilingPieces; piece += kReaderThreads) {
          sum += piece_sum(ptx::load_shared<uint4>(box + piece * kPieceBytes));
        }
        ptx::sync_warp();
      }
      if (threadIdx.x % 32 < kSharing) ring.release(at);
    }
    if (threadIdx.x == 0) {
      ptx::store_global(arguments.cycles + blockIdx.x, ptx::clock_cycles() - begun);
    }
    ptx::store_global(arguments.sum + blockIdx.x * kReaderThreads + threadIdx.x, sum);
  }
  if constexpr (kSharing > 1) ptx::cluster_sync();  // none ends while others reach into it
}

}  // namespace resnet_fused
