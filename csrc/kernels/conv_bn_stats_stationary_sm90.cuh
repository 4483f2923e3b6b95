// conv_bn_stats on the GPU, for sm_90a and short reductions: the convolution of
// conv_bn_stats_sm90.cuh, whose filters stay.
//
// A block's tiles are all of the same channels. Where the reduction has few steps, all of its
// filters for these channels fit into shared memory: they come once, and steps bring pixels alone.
// A warpgroup has a tile's 128 channels for itself, so that pixels are asked of L2, and put through
// a BatchNorm, as seldom as by two warpgroups that work together; and while it stores and measures
// what it has made the other one multiplies.
#pragma once

#include <cstdint>

#include "../device/channel_halves.h"
#include "../device/stationary_shape.h"
#include "conv_bn_stats_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// What a tile's sums are made of where steps bring pixels alone, and warpgroups take turns.
template <class Shape, class Measured>
struct StationaryWay {
  using Place = RingPlace<Shape::kStages>;

  const RingOf<Shape>& ring;
  const Turns& turns;
  const Measured& moments;
  uint32_t thread;  // of the warpgroup

  static RF_DEVICE ptx::SharedAddress shared() {
    return ptx::shared_address(ptx::dynamic_shared());
  }
  RF_DEVICE ptx::SharedAddress filters(int step, const Place&) const {
    return shared() + Shape::kFiltersAt + step * Shape::kFilterBytes;
  }
  RF_DEVICE ptx::SharedAddress pixels(const Place& at) const {
    return shared() + at.stage * Shape::kStageBytes;
  }
  RF_DEVICE void asked(int, const Place&) const {}
  RF_DEVICE void begin() const { moments.begin(); }
  RF_DEVICE void ended() const {
    if (thread % 32 == 0) turns.pass();
  }
  RF_DEVICE void release(const Place& at, bool) const {
    if (thread % 32 == 0) ring.release(at);
  }
};

// The tiles of one consumer, and what it leaves of their statistics.
template <class T, class Shape>
RF_DEVICE void consume_halves(const ConvStatsTmaArguments& arguments, const RingOf<Shape>& ring,
                              ptx::SharedAddress shared, TileWalk walk, uint32_t consumer,
                              uint32_t thread) {
  const ConvTmaArguments& conv = arguments.conv;
  using Measured = WalkMoments<T, Shape::kColumns>;
  const typename Measured::Own own{shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0,
                                   0, static_cast<int>(1 + consumer)};
  static_assert(Measured::kStagingBytes == Shape::kStagingBytes);
  Measured moments[kMostHalves] = {{own, thread}, {own, thread}};
  Turns turns(shared + Shape::kTurnsAt, consumer);
  RingPlace<Shape::kStages> at;
  if (consumer == 1) at.skip(conv.steps);
  skip_others<Shape>(walk, consumer);
  if (walk.done()) return;
  const OutputPlace first = place_of<Shape>(walk, consumer);
  ptx::mbarrier_wait_parity(shared + Shape::kFiltersCameAt, 0);
  HalvesSums<Shape> d;
#pragma unroll
  for (auto& half : d) clear(half);
  const StationaryWay<Shape, Measured> way{ring, turns, moments[0], thread};
  while (!walk.done()) {
    const OutputPlace place = place_of<Shape>(walk, consumer);
    turns.wait();
    sum_halves<T, Shape>(d, ring, at, conv.steps, way);
    finish_halves<Shape>(d, moments, conv, place);
    walk.next();
    walk.next();
    at.skip(conv.steps);
  }
  leave_halves<Shape>(moments, arguments, first);
}

// A block's barriers, by one thread, and its filters, which come before the kernel ahead has ended.
template <class T, class Shape>
RF_DEVICE void begin_stationary(const ConvTmaArguments& conv, const RingOf<Shape>& ring,
                                ptx::SharedAddress shared, ConvSteps<T, Shape> steps) {
  const ptx::SharedAddress came = shared + Shape::kFiltersCameAt;
  ptx::tma_prefetch(&conv.weight);
  ptx::tma_prefetch(&conv.x);
  ptx::tma_prefetch(&conv.out);
  ring.init(Shape::kReaders);
  ptx::mbarrier_init(came, 1);
  Turns::init(shared + Shape::kTurnsAt);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(came, conv.steps * Shape::kFilterBytes);
  for (int i = 0; i < conv.steps; ++i, steps.next()) {
    steps.load_filters(shared + i * Shape::kFilterBytes, came);
  }
}

#endif

// For any other architecture it is empty, and no plan chooses it. Shape: a StationaryShape, or a
// TransformShape of one where a norm is read through. Each block has a tile.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_stats_stationary_kernel(const __grid_constant__ ConvStatsTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ConvTmaArguments& conv = arguments.conv;
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  // Each role makes its own: of one for all ptxas would keep registers in all of them.
  const auto walk = [&] {
    return TileWalk(conv.tiles, conv.reverse, static_cast<int32_t>(blockIdx.x),
                    static_cast<int32_t>(gridDim.x));
  };
  if (threadIdx.x == 0) {
    begin_stationary<T, Shape>(conv, ring, shared, ConvSteps<T, Shape>(conv, walk()));
  }
  const auto produce = [&] {
    ConvSteps<T, Shape> steps(conv, walk());
    RingPlace<Shape::kStages> at;
    for (; !steps.done(); steps.next(), at.next()) {
      ring.acquire(at, Shape::kStageBytes);
      steps.load_pixels(shared + at.stage * Shape::kStageBytes, ring.full(at));
    }
  };
  const auto consume = [&](uint32_t consumer, uint32_t thread) {
    consume_halves<T, Shape>(arguments, ring, shared, walk(), consumer, thread);
  };
  const auto transform = [&](uint32_t thread) {
    if constexpr (Shape::kTransforms) {
      transform_stages<Shape>(ring, shared,
                              NormedSteps<T, Shape>(conv, arguments.norm, walk(), thread));
    }
  };
  ptx::sync_threads();
  wait_for_ahead(conv.dependent);
  take_roles<Shape::kTransforms, kFirstRegisters<Shape>>(produce, consume, transform);
#endif
}

}  // namespace resnet_fused
