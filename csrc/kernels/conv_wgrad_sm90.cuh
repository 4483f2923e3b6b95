// conv_wgrad on the GPU, for sm_90a: the gradient of a convolution's weights by wgmma, fed by TMA.
//
//     dweight[k, e] = scale[k] * sum over m of dz[m, k] * pixel[m, e]
//
// M: output channels of a group, N: its taps and input channels, reduction: output pixels of the
// batch. Both operands lie along channels. One thread asks for steps of 64 pixels: of dy and y
// boxes of 64 output channels, of x a box for each 64 input channels of a tap of the tile. Two
// warpgroups take dy into registers, masked, and multiply it by x as it lies. Each block leaves the
// sums of its part of the pixels in a workspace; the kernel in conv_wgrad_merge_sm80.cuh adds them.
// Blocks of a cluster may bring one another what they read (wgrad_cluster.h).
#pragma once

#include <cstdint>

#include "../device/masked_channels.h"
#include "../device/turned_products.h"
#include "../device/warpgroup_roles.h"
#include "../device/wgrad_parts.h"
#include "../device/wgrad_steps.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape, class MakeLeft>
RF_DEVICE void consume_wgrad(const ConvWgradTmaArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, const Tile& tile, const WgradPart& part,
                             uint32_t consumer, uint32_t thread, const MakeLeft& make_left) {
  const uint32_t row = consumer % Shape::kAlongM;
  const uint32_t column = consumer / Shape::kAlongM;
  const StagePlaces places{row * Shape::kBoxBytes, Shape::kMaskAt + row * Shape::kBoxBytes,
                           Shape::kRightAt + column * Shape::kColumns * kStepRowBytes};
  auto left = make_left(tile, part, row * kWarpgroupRows, thread);
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  clear(d);
  sum_products<T, Shape>(d, ring, at, shared, places, part.steps,
                         thread % 32 < Shape::kRightSharing, left, [] {});
  const TileGrid& tiles = arguments.product.tiles;
  if (Shape::kSharing > 1 && (tile.m >= tiles.tiles_m || tile.n >= tiles.tiles_n)) return;
  leave_wgrad_vectors<Shape>(
      arguments.product, tile, consumer * kWarpgroupThreads + thread,
      [&](int i) { return Vector<float>{{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]}}; });
}

// The producer's: all steps of its block's part.
template <class Shape>
RF_DEVICE void produce_wgrad(const ConvWgradTmaArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, const Tile& tile, const WgradPart& part) {
  const auto stage_of = [&](const RingPlace<Shape::kStages>& at) {
    return shared + at.stage * Shape::kStageBytes;
  };
  RingPlace<Shape::kStages> at;
  WgradSteps<Shape> steps(arguments, tile, part);
  if constexpr (Shape::kSharing == 1) {
    for (; !steps.done(); steps.next(), at.next()) {
      ring.acquire(at, steps.bytes());
      steps.load(stage_of(at), ring.full(at));
    }
  } else {
    // The left side is a step ahead: it has been taken before the products of the step before end,
    // and x's part of their stage is free.
    RingPlace<Shape::kStages> ahead;
    WgradSteps<Shape> left = steps;
    for (int step = 0; step <= part.steps; ++step) {
      if (!left.done() && step >= Shape::kStages) ring.pass(ahead);
      if (step > 0) {
        ring.acquire_read(at);
        steps.load_right(stage_of(at), ring.full(at));
        steps.next();
        at.next();
      }
      if (left.done()) break;
      ring.acquire_turned(ahead, left.bytes());
      left.load_left(stage_of(ahead), ring.full(ahead));
      left.next();
      ahead.next();
    }
  }
}

// A block's life. make_left: the left operand, of (tile, part, the warpgroup's first row of the
// tile, thread of it). transforms: of (ring, shared memory, tile, part, thread), where the shape
// transforms.
template <class T, class Shape, class MakeLeft, class Transform = Idle>
RF_DEVICE void run_wgrad(const ConvWgradTmaArguments& arguments, const MakeLeft& make_left,
                         const Transform& transforms = {}) {
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const Tile tile = own_wgrad_tile<Shape>(arguments.product.tiles);
  const WgradPart part = wgrad_part<T, Shape>(arguments.product, tile);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.x);
    ptx::tma_prefetch(&arguments.dy);
    if (arguments.masked) ptx::tma_prefetch(&arguments.y);
    ring.init(Shape::kReaders);
    ptx::fence_mbarrier_init();
  }
  // Nothing is copied to the others before their barriers are there.
  if constexpr (Shape::kSharing > 1) {
    ptx::cluster_sync();
  } else {
    ptx::sync_threads();
  }
  take_roles<Shape::kTransforms>(
      [&] { produce_wgrad<Shape>(arguments, ring, shared, tile, part); },
      [&](uint32_t consumer, uint32_t thread) {
        consume_wgrad<T, Shape>(arguments, ring, shared, tile, part, consumer, thread, make_left);
      },
      [&](uint32_t thread) { transforms(ring, shared, tile, part, thread); });
  // None ends while others tell it what they have read.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_wgrad_tma_kernel(const __grid_constant__ ConvWgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  run_wgrad<T, Shape>(arguments,
                      [&](const Tile&, const WgradPart&, uint32_t /*row*/, uint32_t thread) {
                        return MaskedChannels<T>(arguments.masked, thread);
                      });
#endif
}

}  // namespace resnet_fused
