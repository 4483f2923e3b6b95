// conv_bn_act on the GPU, for sm_90a and 3x3 convolutions of 64 channels: wgmma on windows of the
// input, of which all nine taps are parts, so that L2 is asked for them once and not nine times;
// conv_window.h says how.
//
// A block stays for many tiles of 64 channels by so many pixels. The filters of its channels come
// once, before the kernel ahead has ended, and stay. One thread asks for windows; two warpgroups
// have a window each, in turns: one's products run while the other one's results go out and its
// next window comes.
#pragma once

#include <cstdint>

#include "../device/block_walk.h"
#include "../device/conv_window.h"
#include "../device/pipeline.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../device/window_epilogue.h"
#include "../device/window_load.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// One tile's sums. `pitch`: bytes from a row of the window's pixels to the next one. `begin` is
// called while the products run, `asked` when all but the last tap's have ended.
template <class T, int kPixels, class Begin, class Asked>
RF_DEVICE void sum_window(float (&d)[kPixels / 2], ptx::SharedAddress filters,
                          ptx::SharedAddress window, uint32_t pitch, const Begin& begin,
                          const Asked& asked) {
  ptx::wgmma_pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int tap = 0; tap < kWindowTaps; ++tap) {
    if (tap == kWindowTaps - 1) ptx::wgmma_commit_group();
    // Rows are swizzled by the bits of their own addresses, wherever a product enters the window:
    // of that no manual speaks, and the conformance program asks ("rows of 128 bytes, shifted").
    multiply_step<T>(d, filters + tap * kWindowFilterBytes,
                     window + tap / 3 * pitch + tap % 3 * kStepRowBytes, tap > 0);
  }
  ptx::wgmma_commit_group();
  begin();
  ptx::wgmma_wait_group<1>();
  asked();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
}

template <class T, class Shape>
RF_DEVICE void consume_windows(const ConvWindowArguments& arguments, const Ring<kConsumers>& ring,
                               ptx::SharedAddress shared, BlockWalk walk, int32_t channel,
                               uint32_t consumer, uint32_t thread) {
  WindowEpilogue<T, Shape::kPixels> epilogue(
      arguments,
      {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0,
       shared + Shape::kResidualAt + consumer * kBarrierBytes, static_cast<int>(1 + consumer)},
      thread, channel);
  Turns turns(shared + Shape::kTurnsAt, consumer);
  const uint32_t pitch = arguments.walk.columns.value * kStepRowBytes;
  const bool releases = thread % 32 == 0;
  RingPlace<kConsumers> at;
  if (consumer == 1) {
    at.next();
    walk.next();
  }
  const ptx::SharedAddress window =
      shared + Shape::kWindowsAt + at.stage * arguments.parts * arguments.part_rows * kStepRowBytes;
  float d[Shape::kPixels / 2];
  clear(d);
  ptx::mbarrier_wait_parity(shared + Shape::kFiltersFullAt, 0);
  while (!walk.done()) {
    const int32_t position = walk.index() * Shape::kPixels;
    turns.wait();
    ring.wait(at);
    sum_window<T, Shape::kPixels>(
        d, shared, window, pitch, [&] { epilogue.begin(position); },
        [&] {
          if (releases) turns.pass();
        });
    if (releases) ring.release(at);
    epilogue.finish(d, position);
    walk.next();
    walk.next();
    at.skip(kConsumers);
  }
}

// The thread that asks for windows.
template <class Shape>
RF_DEVICE void produce_windows(const ConvWindowArguments& arguments, const Ring<kConsumers>& ring,
                               ptx::SharedAddress shared, BlockWalk walk) {
  const int32_t bytes = arguments.parts * arguments.part_rows * kStepRowBytes;
  RingPlace<kConsumers> at;
  for (; !walk.done(); walk.next(), at.next()) {
    ring.acquire(at, static_cast<uint32_t>(bytes));
    load_window(shared + Shape::kWindowsAt + at.stage * bytes, arguments,
                walk.index() * Shape::kPixels, ring.full(at));
  }
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_act_window_kernel(const __grid_constant__ ConvWindowArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const Ring<kConsumers> ring{shared + Shape::kRingAt};
  const auto block = static_cast<int32_t>(blockIdx.x);
  // Blocks of one column of tiles lie `columns` apart.
  const BlockWalk walk(arguments.tiles, arguments.reverse, block / arguments.columns,
                       static_cast<int32_t>(gridDim.x) / arguments.columns);
  const int32_t channel = block % arguments.columns * kWarpgroupRows;
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.weight);
    ptx::tma_prefetch(&arguments.x);
    if (arguments.has_residual) ptx::tma_prefetch(&arguments.residual);
    ring.init(kWarpgroupWarps);
    const ptx::SharedAddress filters_full = shared + Shape::kFiltersFullAt;
    ptx::mbarrier_init(filters_full, 1);
    for (int i = 0; i < kConsumers; ++i) {
      ptx::mbarrier_init(shared + Shape::kResidualAt + i * kBarrierBytes, 1);
    }
    Turns::init(shared + Shape::kTurnsAt);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(filters_full, kWindowFilters);
    load_taps(shared, &arguments.weight, channel, filters_full);
  }
  run_roles(
      arguments.dependent, [&] { produce_windows<Shape>(arguments, ring, shared, walk); },
      [&](uint32_t consumer, uint32_t thread) {
        consume_windows<T, Shape>(arguments, ring, shared, walk, channel, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
