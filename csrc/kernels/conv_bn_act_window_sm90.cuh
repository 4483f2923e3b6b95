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
#include "../device/conv_types.h"
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

// Asks for one tap's products. `filters`, `window`: where all taps' filters begin, and the first
// position's first tap. `pitch`: bytes from a row of the window's pixels to the next one.
template <class T, class Shape>
RF_DEVICE void multiply_tap(float (&d)[Shape::kColumns / 2], int tap, ptx::SharedAddress filters,
                            ptx::SharedAddress window, uint32_t pitch, bool accumulate) {
  // Rows are swizzled by the bits of their own addresses, wherever a product enters the window: of
  // that no manual speaks, and the conformance program asks ("rows of 128 bytes, shifted", "rows of
  // 64 bytes, shifted").
  multiply_step<T, Shape::kRowBytes>(d, filters + tap * Shape::kFilterBytes,
                                     window + tap / 3 * pitch + tap % 3 * Shape::kRowBytes,
                                     accumulate);
}

// One tile's sums: multiply(d, tap, accumulate) asks for a tap's. `begin` is called while the
// products run, `asked` when all but the last ones have ended.
template <int kRegisters, class Multiply, class Begin, class Asked>
RF_DEVICE void sum_window(float (&d)[kRegisters], const Multiply& multiply, const Begin& begin,
                          const Asked& asked) {
  ptx::wgmma_pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (int tap = 0; tap < kWindowTaps; ++tap) {
    if (tap == kWindowTaps - 1) ptx::wgmma_commit_group();
    multiply(d, tap, tap > 0);
  }
  ptx::wgmma_commit_group();
  begin();
  ptx::wgmma_wait_group<1>();
  asked();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
}

// The same where the sums of two taps, a step's 128 products, are added to the tile's by the
// threads: of one half of the positions while the products of the other half run.
template <class T, class Shape, class Begin, class Asked>
RF_DEVICE void sum_window_in_parts(float (&d)[Shape::kPixels / 2],
                                   float (&halves)[Shape::kPasses][Shape::kColumns / 2],
                                   ptx::SharedAddress filters, ptx::SharedAddress window,
                                   uint32_t pitch, const Begin& begin, const Asked& asked) {
  static_assert(Shape::kPasses == 2);
  constexpr int kTaps = kStepRowBytes / Shape::kRowBytes;  // of a part
  constexpr int kParts = (kWindowTaps + kTaps - 1) / kTaps;
  const auto multiply = [&](int part, int half) {
    const ptx::SharedAddress from = window + half * Shape::kColumns * Shape::kRowBytes;
#pragma unroll
    for (int tap = part * kTaps; tap < kWindowTaps && tap < (part + 1) * kTaps; ++tap) {
      multiply_tap<T, Shape>(halves[half], tap, filters, from, pitch, tap > part * kTaps);
    }
    ptx::wgmma_commit_group();
  };
  clear(d);
  ptx::wgmma_pin(halves[0]);
  ptx::wgmma_pin(halves[1]);
  ptx::wgmma_fence();
  multiply(0, 0);
  multiply(0, 1);
  begin();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool last = part == kParts - 1;
      if (last && half == 1) {
        ptx::wgmma_wait_group<0>();
      } else {
        ptx::wgmma_wait_group<1>();
      }
      ptx::wgmma_pin(halves[half]);
      if (last && half == 0) asked();
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 2; ++i) {
        d[half * Shape::kColumns / 2 + i] += halves[half][i];
      }
      if (last) continue;
      ptx::wgmma_pin(halves[half]);
      ptx::wgmma_fence();
      multiply(part + 1, half);
    }
  }
}

// One thread's, ahead of all else: barriers, and the filters of the channels from `channel` on,
// which stay.
template <class Shape>
RF_DEVICE void begin_windows(const ConvWindowArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, int32_t channel) {
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
  ptx::mbarrier_arrive_expect_tx(filters_full, Shape::kFilters);
  load_taps<Shape::kRowBytes>(shared, &arguments.weight, channel, filters_full);
}

// What a consumer has for its own.
template <class Shape, class Epilogue>
RF_DEVICE typename Epilogue::Own own_of(ptx::SharedAddress shared, uint32_t consumer) {
  static_assert(Epilogue::kStagingBytes <= Shape::kStagingBytes);
  return {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0,
          shared + Shape::kResidualAt + consumer * kBarrierBytes, static_cast<int>(1 + consumer)};
}

// One of two consumers: every other tile of the walk. begin(position) is called while a tile's
// products run, finish(d, position) behind them.
template <class T, class Shape, class Walk, class Begin, class Finish>
RF_DEVICE void consume_windows(const ConvWindowArguments& arguments, const RingOf<Shape>& ring,
                               ptx::SharedAddress shared, Walk walk, uint32_t consumer,
                               uint32_t thread, const Begin& begin, const Finish& finish) {
  using Types = ConvTypes<T>;
  using Operand = typename Types::Operand;
  static_assert(Shape::kRowBytes == kWindowChannels * sizeof(Operand));
  Turns turns(shared + Shape::kTurnsAt, consumer);
  const uint32_t pitch = arguments.walk.columns.value * Shape::kRowBytes;
  const bool releases = thread % 32 == 0;
  RingPlace<kConsumers> at;
  if (consumer == 1) {
    at.next();
    walk.next();
  }
  const ptx::SharedAddress window =
      shared + Shape::kWindowsAt +
      at.stage * arguments.parts * arguments.part_rows * Shape::kRowBytes;
  float d[Shape::kPixels / 2];
  float halves[Shape::kPasses][Types::kInParts ? Shape::kColumns / 2 : 1];
  clear(d);
  for (auto& half : halves) clear(half);
  ptx::mbarrier_wait_parity(shared + Shape::kFiltersFullAt, 0);
  while (!walk.done()) {
    const int32_t position = walk.index() * Shape::kPixels;
    turns.wait();
    ring.wait(at);
    const auto beside = [&] { begin(position); };
    const auto asked = [&] {
      if (releases) turns.pass();
    };
    if constexpr (Types::kInParts) {
      sum_window_in_parts<Operand, Shape>(d, halves, shared, window, pitch, beside, asked);
    } else {
      const auto multiply = [&](float (&sums)[Shape::kPixels / 2], int tap, bool accumulate) {
        multiply_tap<Operand, Shape>(sums, tap, shared, window, pitch, accumulate);
      };
      sum_window(d, multiply, beside, asked);
    }
    if (releases) ring.release(at);
    finish(d, position);
    walk.next();
    walk.next();
    at.skip(kConsumers);
  }
}

// The thread that asks for windows.
template <class Shape, class Walk>
RF_DEVICE void produce_windows(const ConvWindowArguments& arguments, const RingOf<Shape>& ring,
                               ptx::SharedAddress shared, Walk walk) {
  const int32_t bytes = arguments.parts * arguments.part_rows * Shape::kRowBytes;
  RingPlace<kConsumers> at;
  for (; !walk.done(); walk.next(), at.next()) {
    ring.acquire(at, static_cast<uint32_t>(bytes));
    load_window<Shape::kRowBytes>(shared + Shape::kWindowsAt + at.stage * bytes, arguments,
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
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const auto block = static_cast<int32_t>(blockIdx.x);
  // Blocks of one column of tiles lie `columns` apart.
  const BlockWalk walk(arguments.tiles, arguments.reverse, block / arguments.columns,
                       static_cast<int32_t>(gridDim.x) / arguments.columns);
  const int32_t channel = block % arguments.columns * kWarpgroupRows;
  if (threadIdx.x == 0) begin_windows<Shape>(arguments, ring, shared, channel);
  run_roles(
      arguments.dependent, [&] { produce_windows<Shape>(arguments, ring, shared, walk); },
      [&](uint32_t consumer, uint32_t thread) {
        using Epilogue = WindowEpilogue<T, Shape::kPixels>;
        Epilogue epilogue(arguments, own_of<Shape, Epilogue>(shared, consumer), thread, channel);
        consume_windows<T, Shape>(
            arguments, ring, shared, walk, consumer, thread,
            [&](int32_t position) { epilogue.begin(position); },
            [&](float (&d)[Shape::kPixels / 2], int32_t position) {
              epilogue.finish(d, position);
            });
      });
#endif
}

}  // namespace resnet_fused
