// conv_bn_act on the GPU, for sm_90a: implicit GEMM on wgmma, fed by TMA, with BatchNorm's scale
// and shift, the shortcut and the ReLU in its epilogue.
//
// A block stays for many tiles. One thread asks for steps of 128 bytes of one tap's channels, for
// all of a tile's pixels at a time (TMA's im2col walks over rows and images, and brings zeros for
// what lies beside an image); two warpgroups multiply, and each stores what it has made while the
// next tile's steps come. Filters come before the kernel ahead has ended, everything else after
// that.
#pragma once

#include <cstdint>

#include "../device/conv_types.h"
#include "../device/pipeline.h"
#include "../device/tap_steps.h"
#include "../device/tma_conv.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_shape.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/cluster.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The producer's way through the steps of its block's tiles, filters and pixels.
template <class T, class Shape>
class ConvSteps : public TapSteps<T, Shape> {
 public:
  using TapSteps<T, Shape>::TapSteps;

  RF_DEVICE void load_filters(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const ptx::SharedAddress to = stage + Shape::kFiltersAt;
    const Column& at = this->column_;
    const ConvTmaArguments& told = *this->arguments_;
    const int32_t filter =
        this->tile_.group * told.channels + this->tile_.channels * Shape::kChannels;
    if constexpr (SharedRows<Shape>::kFilters) {
      const ClusterPlace<Shape> place;
      const int32_t part = place.pixels * Shape::kFilterPart;
      ptx::tma_load_multicast(to + part * kStepRowBytes, &told.weight,
                              {at.c, at.s, at.r, filter + part}, full, place.with_its_filters());
    } else {
      ptx::tma_load(to, &told.weight, {at.c, at.s, at.r, filter}, full);
    }
  }
  RF_DEVICE void load_pixels(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    this->load_taps(&this->arguments_->x, stage + Shape::kPixelsAt, full);
  }
};

// One tile's sums. `begin` is called while the first step's products run, `asked` when those of the
// last one have been asked for.
template <class T, class Shape, class Begin, class Asked>
RF_DEVICE void sum_tile(float (&d)[Shape::kColumns / 2], const RingOf<Shape>& ring,
                        RingPlace<Shape::kStages>& at, ptx::SharedAddress left, int steps,
                        bool releases, const Begin& begin, const Asked& asked) {
  const ptx::SharedAddress right = ptx::shared_address(ptx::dynamic_shared()) + Shape::kRightAt;
  RingPlace<Shape::kStages> before = at;
  ptx::wgmma_pin(d);
  for (int step = 0; step < steps; ++step) {
    ring.wait(at);
    ptx::wgmma_fence();
    multiply_step<T>(d, left + at.stage * Shape::kStageBytes, right + at.stage * Shape::kStageBytes,
                     step > 0);
    ptx::wgmma_commit_group();
    if (step == 0) {
      begin();
    } else {
      ptx::wgmma_wait_group<1>();
      if (releases) ring.release(before);
    }
    before = at;
    at.next();
  }
  asked();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  if (releases) ring.release(before);
}

// The same where each step's sums, in `part`, are added to the tile's by the threads; the other
// warpgroup's products run meanwhile.
template <class T, class Shape, class Begin, class Asked>
RF_DEVICE void sum_tile_in_parts(float (&d)[Shape::kColumns / 2],
                                 float (&part)[Shape::kColumns / 2], const RingOf<Shape>& ring,
                                 RingPlace<Shape::kStages>& at, ptx::SharedAddress left, int steps,
                                 bool releases, const Begin& begin, const Asked& asked) {
  const ptx::SharedAddress right = ptx::shared_address(ptx::dynamic_shared()) + Shape::kRightAt;
  clear(d);
  for (int step = 0; step < steps; ++step) {
    ring.wait(at);
    ptx::wgmma_pin(part);
    ptx::wgmma_fence();
    multiply_step<T>(part, left + at.stage * Shape::kStageBytes,
                     right + at.stage * Shape::kStageBytes, false);
    ptx::wgmma_commit_group();
    if (step == 0) begin();
    if (step == steps - 1) asked();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(part);
    if (releases) ring.release(at);
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) d[i] += part[i];
    at.next();
  }
}

// Where a consumer's part of the walk's tile begins in the output.
template <class Shape>
RF_DEVICE OutputPlace place_of(const TileWalk& walk, uint32_t consumer) {
  const TmaTile tile = own_tile<Shape>(walk);
  OutputPlace place{tile.channels * Shape::kChannels, tile.group, tile.pixels * Shape::kPixels};
  if (Shape::kTogether) {
    (Shape::kPixelsLeft ? place.pixel : place.channel) +=
        static_cast<int32_t>(consumer) * kWarpgroupRows;
  }
  return place;
}

// To the consumer's own first tile.
template <class Shape>
RF_DEVICE void skip_others(TileWalk& walk, uint32_t consumer) {
  if (!Shape::kTogether && consumer == 1) walk.next();
}

// The tiles of one consumer. begin(place): while a tile's first products run; finish(d, place): of
// its sums.
template <class T, class Shape, class Begin, class Finish>
RF_DEVICE void consume_tiles(const ConvTmaArguments& arguments, const RingOf<Shape>& ring,
                             ptx::SharedAddress shared, TileWalk walk, uint32_t consumer,
                             uint32_t thread, const Begin& begin_tile, const Finish& finish_tile) {
  using Types = ConvTypes<T>;
  Turns turns(shared + Shape::kTurnsAt, consumer);
  const uint32_t row = Shape::kTogether ? consumer * kWarpgroupRows : 0;  // of the left side
  const bool releases = thread % 32 < Shape::kSharing;
  RingPlace<Shape::kStages> at;
  if (!Shape::kTogether && consumer == 1) at.skip(arguments.steps);
  skip_others<Shape>(walk, consumer);
  constexpr int kSums = Shape::kColumns / 2;
  float d[kSums];
  float part[Types::kInParts ? kSums : 1];
  clear(d);
  clear(part);
  while (!walk.done()) {
    const OutputPlace place = place_of<Shape>(walk, consumer);
    if constexpr (!Shape::kTogether) turns.wait();
    const ptx::SharedAddress left = shared + row * kStepRowBytes;
    const auto begin = [&] { begin_tile(place); };
    const auto asked = [&] {
      if (!Shape::kTogether && thread % 32 == 0) turns.pass();
    };
    using Operand = typename Types::Operand;
    if constexpr (Types::kInParts) {
      sum_tile_in_parts<Operand, Shape>(d, part, ring, at, left, arguments.steps, releases, begin,
                                        asked);
    } else {
      sum_tile<Operand, Shape>(d, ring, at, left, arguments.steps, releases, begin, asked);
    }
    finish_tile(d, place);
    walk.next();
    if constexpr (!Shape::kTogether) {
      walk.next();
      at.skip(arguments.steps);
    }
  }
}

template <class T, class Shape>
RF_DEVICE void consume(const ConvTmaArguments& arguments, const RingOf<Shape>& ring,
                       ptx::SharedAddress shared, const TileWalk& walk, uint32_t consumer,
                       uint32_t thread) {
  const ptx::TensorMap* const residual = arguments.has_residual ? &arguments.residual : nullptr;
  using Types = ConvTypes<T>;
  using Epilogue = typename Types::template Epilogue<Shape::kOrientation, Shape::kColumns>;
  static_assert(Epilogue::kStagingBytes <= Shape::kStagingBytes);
  Epilogue epilogue(
      {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes,
       shared + Shape::kVectorsAt + consumer * Shape::kVectorsBytes,
       shared + Shape::kResidualAt + consumer * kBarrierBytes, static_cast<int>(1 + consumer)},
      thread);
  const auto act = Types::act(arguments);
  consume_tiles<T, Shape>(
      arguments, ring, shared, walk, consumer, thread,
      [&](const OutputPlace& place) {
        const int32_t channel = place.group * arguments.channels;
        const ChannelVectors vectors{arguments.scale + channel, arguments.shift + channel,
                                     arguments.channels};
        epilogue.begin(vectors, residual, place);
      },
      [&](const float (&d)[Shape::kColumns / 2], const OutputPlace& place) {
        epilogue.finish(d, act, &arguments.out, residual != nullptr, place, arguments.channels);
      });
  epilogue.end();
}

// Registers of a thread of the first warpgroup: what the shape says, or what others have.
template <class Shape>
constexpr int kFirstRegisters = Shape::kTransforms ? kTransformRegisters : kProducerRegisters;
template <class Shape>
  requires(Shape::kTransforms && requires { Shape::kTransformRegisters; })
constexpr int kFirstRegisters<Shape> = Shape::kTransformRegisters;

// A block, from its barriers to its last tile. consumes: of (ring, shared memory, walk, which of
// the consumers, thread of it). transforms: of (ring, shared memory, walk, thread), where the shape
// transforms. Steps: the producer's way, made of (arguments, walk, more).
template <class T, class Shape, class Steps = ConvSteps<T, Shape>, class Consume,
          class Transform = Idle, class... More>
RF_DEVICE void run_convolution(const ConvTmaArguments& arguments, const Consume& consumes,
                               const Transform& transforms = {}, const More&... more) {
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const auto full_of = [&](const RingPlace<Shape::kStages>& at) { return ring.full(at); };
  const auto stage_of = [&](const RingPlace<Shape::kStages>& at) {
    return shared + at.stage * Shape::kStageBytes;
  };
  // Each role makes its own: of one for all ptxas would keep registers in all of them.
  const auto walk = [&] {
    return TileWalk(arguments.tiles, arguments.reverse,
                    static_cast<int32_t>(blockIdx.x / Shape::kSharing),
                    static_cast<int32_t>(gridDim.x / Shape::kSharing));
  };
  Steps steps(arguments, walk(), more...);
  RingPlace<Shape::kStages> at;
  int early = 0;  // steps whose filters have been asked for
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.weight);
    ptx::tma_prefetch(&arguments.x);
    ptx::tma_prefetch(&arguments.out);
    if (arguments.has_residual) ptx::tma_prefetch(&arguments.residual);
    ring.init(Shape::kReaders);
    for (int i = 0; i < kConsumers; ++i) {
      ptx::mbarrier_init(shared + Shape::kResidualAt + i * kBarrierBytes, 1);
    }
    if constexpr (!Shape::kTogether) Turns::init(shared + Shape::kTurnsAt);
    ptx::fence_mbarrier_init();
  }
  // Nothing is copied to the others before their barriers are there.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
  if (threadIdx.x == 0) {
    auto ahead = steps;
    auto place = at;
    for (; early < Shape::kStages && !ahead.done(); ++early) {
      ring.acquire(place, Shape::kStageBytes);
      ahead.load_filters(stage_of(place), full_of(place));
      ahead.next();
      place.next();
    }
  }
  const auto produce = [&] {
    for (; !steps.done(); steps.next(), at.next()) {
      if (early > 0) {
        --early;
      } else {
        ring.acquire(at, Shape::kStageBytes);
        steps.load_filters(stage_of(at), full_of(at));
      }
      steps.load_pixels(stage_of(at), full_of(at));
    }
  };
  const auto consume = [&](uint32_t consumer, uint32_t thread) {
    consumes(ring, shared, walk(), consumer, thread);
  };
  const auto transform = [&](uint32_t thread) { transforms(ring, shared, walk(), thread); };
  run_roles<Shape::kTransforms, kFirstRegisters<Shape>>(arguments.dependent, produce, consume,
                                                        transform);
  // None ends while others tell it what they have read.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_act_tma_kernel(const __grid_constant__ ConvTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  run_convolution<T, Shape>(
      arguments, [&](const RingOf<Shape>& ring, ptx::SharedAddress shared, const TileWalk& walk,
                     uint32_t consumer, uint32_t thread) {
        consume<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
