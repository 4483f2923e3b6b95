// bn_add_act_conv_stats on the GPU, for sm_90a: a residual block's end, made as the next block's
// 1x1 convolution reads; see bn_add_act_conv_stats_sm80.cuh.
//
// As conv_bn_stats_sm90.cuh has it, a block stays for many tiles of the same channels. TMA brings a
// step of y and of the shortcut; three warps make the block's end in the place of y; two warpgroups
// multiply it, and one of their threads has it stored from where it lies. So a stage is free when
// its products have been waited for and its copy to memory has read it.
#pragma once

#include <cstdint>

#include "../device/block_end_shape.h"
#include "../device/block_end_steps.h"
#include "../device/channel_halves.h"
#include "conv_bn_act_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The producer's way: with the shortcut's pixels beside the raw output's.
template <class T, class Shape>
class BlockEndSteps : public ConvSteps<T, Shape> {
  using Base = ConvSteps<T, Shape>;

 public:
  RF_DEVICE BlockEndSteps(const ConvTmaArguments& conv, const TileWalk& walk,
                          const ptx::TensorMap* shortcut)
      : Base(conv, walk), shortcut_(shortcut) {}

  RF_DEVICE void load_pixels(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    Base::load_pixels(stage, full);
    this->load_taps(shortcut_, stage + Shape::kShortcutAt, full);
  }

 private:
  const ptx::TensorMap* shortcut_;
};

// What a tile's sums are made of.
template <class Shape, class Measured>
struct BlockEndWay {
  using Place = RingPlace<Shape::kStages>;

  const RingOf<Shape>& ring;
  const BlockEndStore<Shape>& store;
  const Measured& moments;
  uint32_t consumer;
  uint32_t thread;  // of it

  static RF_DEVICE ptx::SharedAddress stage(const Place& at) {
    return ptx::shared_address(ptx::dynamic_shared()) + at.stage * Shape::kStageBytes;
  }
  RF_DEVICE ptx::SharedAddress filters(int, const Place& at) const {
    return stage(at) + Shape::kFiltersAt +
           consumer * Shape::kHalves * kWarpgroupRows * kStepRowBytes;
  }
  RF_DEVICE ptx::SharedAddress pixels(const Place& at) const {
    return stage(at) + Shape::kPixelsAt;
  }
  RF_DEVICE void asked(int step, const Place& at) const { store.send(step, pixels(at)); }
  RF_DEVICE void begin() const { moments.begin(); }
  RF_DEVICE void ended() const {}
  RF_DEVICE void release(const Place& at, bool last) const {
    store.wait(last);
    if (thread % 32 == 0) ring.release(at);
  }
};

// Where a consumer's channels of the walk's tile begin in the output.
template <class Shape>
RF_DEVICE OutputPlace halves_of(const TmaTile& tile, uint32_t consumer) {
  return {tile.channels * Shape::kChannels +
              static_cast<int32_t>(consumer) * Shape::kHalves * kWarpgroupRows,
          tile.group, tile.pixels * Shape::kPixels};
}

// The tiles of one consumer, and what it leaves of their statistics.
template <class T, class Shape>
RF_DEVICE void consume_ended(const BlockEndTmaArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, TileWalk walk, uint32_t consumer,
                             uint32_t thread) {
  const ConvTmaArguments& conv = arguments.stats.conv;
  using Measured = WalkMoments<T, Shape::kColumns>;
  static_assert(Measured::kStagingBytes == Shape::kStagingBytes);
  const typename Measured::Own own{shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0,
                                   0, static_cast<int>(1 + consumer)};
  Measured moments[kMostHalves] = {{own, thread}, {own, thread}};
  BlockEndStore<Shape> store(arguments, consumer, thread);
  const BlockEndWay<Shape, Measured> way{ring, store, moments[0], consumer, thread};
  if (walk.done()) return;
  const OutputPlace first = halves_of<Shape>(walk.tile(), consumer);
  RingPlace<Shape::kStages> at;
  HalvesSums<Shape> d;
#pragma unroll
  for (auto& half : d) clear(half);
  for (; !walk.done(); walk.next()) {
    const TmaTile tile = walk.tile();
    store.enter(tile);
    sum_halves<T, Shape>(d, ring, at, conv.steps, way);
    finish_halves<Shape>(d, moments, conv, halves_of<Shape>(tile, consumer));
  }
  leave_halves<Shape>(moments, arguments.stats, first);
}

#endif

// For any other architecture it is empty, and no plan chooses it. Shape: a TransformShape of a
// BlockEndShape. kProjected: the shortcut is read through a BatchNorm of its own.
template <class T, class Shape, bool kProjected>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    bn_add_act_conv_stats_tma_kernel(const __grid_constant__ BlockEndTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.shortcut);
    ptx::tma_prefetch(&arguments.made);
  }
  run_convolution<T, Shape, BlockEndSteps<T, Shape>>(
      arguments.stats.conv,
      [&](const RingOf<Shape>& ring, ptx::SharedAddress shared, const TileWalk& walk,
          uint32_t consumer, uint32_t thread) {
        consume_ended<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      },
      [&](const RingOf<Shape>& ring, ptx::SharedAddress shared, const TileWalk& walk,
          uint32_t thread) {
        transform_stages<Shape>(ring, shared,
                                BlockEndRows<T, Shape, kProjected>(arguments, walk, thread));
      },
      &arguments.shortcut);
#endif
}

}  // namespace resnet_fused
