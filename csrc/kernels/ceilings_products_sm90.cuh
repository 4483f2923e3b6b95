// How many products a cycle wgmma makes of operands that stay where they are, by one warpgroup or
// two, with the left side in shared memory or in registers; alone, and beside TMA that brings so
// many bytes a step to other places of shared memory.
#pragma once

#include "../device/ceiling_path.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/clock.h"
#include "../ptx/tma.h"

namespace resnet_fused {

enum class LeftSide { kShared, kRegisters };

struct CeilingProductArguments {
  ptx::TensorMap operands;  // [kOperandRows][64], boxes of kOperandBoxRows rows, swizzled
  ptx::TensorMap traffic;   // a set, boxes of kTrafficRows rows
  const uint32_t* words;    // the operands, two a word
  CeilingPath path;         // of the traffic
  int32_t traffic_boxes;    // a step, at most kMostTraffic; 0: none
  int32_t steps;
  float* out;       // [blocks, consumers, kWarpgroupThreads, kColumns / 2]
  int64_t* cycles;  // [blocks, consumers]
};

#if defined(RF_HAS_WGMMA)

template <int kColumns>
RF_DEVICE void bring_operands(const CeilingProductArguments& arguments, ptx::SharedAddress shared,
                              ptx::SharedAddress full) {
  constexpr int kRows = kOperandBoxRows;
  constexpr int kLeft = kConsumers * kWarpgroupRows;
  ptx::mbarrier_arrive_expect_tx(full, (kLeft + kColumns) * kStepRowBytes);
  for (int32_t row = 0; row < kLeft + kColumns; row += kRows) {
    ptx::tma_load(shared + row * kStepRowBytes, &arguments.operands, {0, row}, full);
  }
}

template <int kColumns>
RF_DEVICE void bring_traffic(const CeilingProductArguments& arguments, ptx::SharedAddress shared,
                             const Ring<kTrafficStages>& ring) {
  const auto boxes = static_cast<uint32_t>(arguments.traffic_boxes);
  CeilingWalk walk(arguments.path);
  RingPlace<kTrafficStages> at;
#pragma unroll 1
  for (int32_t step = 0; step < arguments.steps; ++step, at.next()) {
    ring.acquire(at, boxes * kTrafficBytes);
    for (uint32_t box = 0; box < boxes; ++box, walk.next()) {
      const uint32_t place = at.stage * kMostTraffic + box;
      ptx::tma_load(shared + ProductRoom<kColumns>::kTrafficAt + place * kTrafficBytes,
                    &arguments.traffic, {0, walk.box() * kTrafficRows}, ring.full(at));
    }
  }
}

// The warpgroup's 64 rows of the left side, as a[4] of each product of a step.
RF_DEVICE void load_left(uint32_t (&left)[kProducts][4], const uint32_t* words, uint32_t consumer,
                         uint32_t thread) {
  constexpr uint32_t kRowWords = kStepRowBytes / 4;
  const uint32_t row = consumer * kWarpgroupRows + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (uint32_t i = 0; i < kProducts; ++i) {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t column = i * (kProductBytes / 4) + thread % 4 + j / 2 * 4;
      left[i][j] = ptx::load_global(words + (row + j % 2 * 8) * kRowWords + column);
    }
  }
}

template <int kColumns, LeftSide kLeftSide>
RF_DEVICE void multiply_steps(float (&d)[kColumns / 2], const CeilingProductArguments& arguments,
                              ptx::SharedAddress shared, const Ring<kTrafficStages>& ring,
                              uint32_t consumer, uint32_t thread) {
  const ptx::SharedAddress right = shared + ProductRoom<kColumns>::kRightAt;
  const ptx::SharedAddress rows = shared + consumer * kWarpgroupRows * kStepRowBytes;
  uint32_t left[kProducts][4];
  if constexpr (kLeftSide == LeftSide::kRegisters) {
    load_left(left, arguments.words, consumer, thread);
#pragma unroll
    for (uint32_t (&one)[4] : left) ptx::wgmma_pin(one);
  }
  RingPlace<kTrafficStages> at, before;
#pragma unroll 1
  for (int32_t step = 0; step < arguments.steps; ++step) {
    if (arguments.traffic_boxes != 0) ring.wait(at);
    ptx::wgmma_fence();
    if constexpr (kLeftSide == LeftSide::kRegisters) {
      multiply_step<BFloat16>(d, left, right, step > 0);
    } else {
      multiply_step<BFloat16>(d, rows, right, step > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (step > 0) {
      if (arguments.traffic_boxes != 0 && thread % 32 == 0) ring.release(before);
      before.next();
    }
    at.next();
  }
  ptx::wgmma_wait_group<0>();
}

#endif

// kConsumers warpgroups behind the one that asks, or one. For any other architecture it is empty.
template <int kColumns, LeftSide kLeftSide>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    ceilings_products_kernel(const __grid_constant__ CeilingProductArguments arguments) {
#if defined(RF_HAS_WGMMA)
  using Room = ProductRoom<kColumns>;
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const Ring<kTrafficStages> ring{shared + Room::kRingAt};
  const ptx::SharedAddress full = shared + Room::kFullAt;
  const uint32_t consumers = blockDim.x / kWarpgroupThreads - 1;
  if (threadIdx.x == 0) {
    ring.init(consumers * kWarpgroupWarps);
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  const auto produce = [&] {
    bring_operands<kColumns>(arguments, shared, full);
    if (arguments.traffic_boxes != 0) bring_traffic<kColumns>(arguments, shared, ring);
  };
  const auto consume = [&](uint32_t consumer, uint32_t thread) {
    float d[kColumns / 2];
    clear(d);
    ptx::wgmma_pin(d);
    ptx::mbarrier_wait_parity(full, 0);
    const int64_t begun = ptx::clock_cycles();
    multiply_steps<kColumns, kLeftSide>(d, arguments, shared, ring, consumer, thread);
    const int64_t ended = ptx::clock_cycles();
    ptx::wgmma_pin(d);
    const uint32_t place = blockIdx.x * consumers + consumer;
    if (thread == 0) ptx::store_global(arguments.cycles + place, ended - begun);
    float* out = arguments.out + (int64_t{place} * kWarpgroupThreads + thread) * (kColumns / 2);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) ptx::store_global(out + i, d[i]);
  };
  take_roles(produce, consume);
#endif
}

}  // namespace resnet_fused
