// conv_dgrad on the GPU, for sm_90a: the gradient of a convolution's input by wgmma, fed by TMA.
//
//     dx[m, c] = sum over e of (scale * dz)[m, e] * filter[e, c]
//
// M: input pixels of one phase of the stride, N: input channels of a group, reduction: the phase's
// taps and the group's output channels.
// A block stays for many tiles; those of a cluster for neighbouring ones, of which each asks for a
// part of what all read. One thread asks for steps of 64 channels of one tap: of dy, of y,
// whose zeros beside the image let nothing pass, and of the filters, which are read across. Two
// warpgroups turn dy in registers, each its 64 rows, and multiply; while one turns a step the
// products of its last one and of the other run.
#pragma once

#include <cstdint>

#include "../device/dgrad_tma.h"
#include "../device/masked_operand.h"
#include "../device/pair.h"
#include "../device/phase_place.h"
#include "../device/tap_steps.h"
#include "../device/turned_products.h"
#include "../device/turned_ring.h"
#include "../device/warpgroup_epilogue.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Blocks of a cluster share dy and y, which are turned, or filters, which are read, or both.
template <class Shape>
  requires(Shape::kTurned && Shape::kSharing > 1)
struct RingType<Shape> {
  using type = TurnedRing<Shape::kStages, Shape::kPixelSharing, Shape::kFilterSharing>;
};

// The producer's way through the steps of its block's tiles. The first tap of dy's walk meets the
// filter's last one.
template <class T, class Shape>
class DgradSteps : public TapSteps<T, Shape, PhasedWalk> {
 public:
  RF_DEVICE DgradSteps(const ConvDgradTmaArguments& arguments, const PhasedWalk& walk)
      : TapSteps<T, Shape, PhasedWalk>(arguments.phases[0].conv, walk), masked_(arguments.masked) {}

  RF_DEVICE uint32_t bytes() const {
    return Shape::kStageBytes - (masked_ ? 0 : Shape::kPixelBytes);
  }

  RF_DEVICE void load_pixels(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const DgradPhase& phase = this->walk_.told();
    this->load_taps(&phase.conv.x, stage + Shape::kPixelsAt, full);
    if (masked_) this->load_taps(&phase.y, stage + Shape::kMaskAt, full);
  }
  RF_DEVICE void load_filters(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const Column& at = this->column_;
    const DgradPhase& phase = this->walk_.told();
    const int32_t r = phase.taps_h.last - at.r * phase.taps_h.step;
    const int32_t s = phase.taps_w.last - at.s * phase.taps_w.step;
    const int32_t first = this->tile_.channels * Shape::kChannels;
    const ptx::SharedAddress to = stage + Shape::kFiltersAt;
    const int32_t element = this->channel_ + at.c;
    if constexpr (SharedRows<Shape>::kFilters) {
      const ClusterPlace<Shape> place;
#pragma unroll 1
      for (int i = 0; i < Shape::kFilterBoxes; ++i) {
        const int32_t box = place.pixels * Shape::kFilterBoxes + i;
        ptx::tma_load_multicast(to + box * kAcrossBoxBytes, &phase.conv.weight,
                                {first + box * kStepElements, s, r, element}, full,
                                place.with_its_filters());
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Shape::kBoxes; ++i) {
        ptx::tma_load(to + i * kAcrossBoxBytes, &phase.conv.weight,
                      {first + i * kStepElements, s, r, element}, full);
      }
    }
  }

 private:
  bool masked_;
};

// A warpgroup's sums, rounded once, into dx.
template <class T, int kColumns>
class DgradStore : public StagedEpilogue<StagedTile<Orientation::kPixelsLeft, kColumns>,
                                         Orientation::kPixelsLeft, kColumns> {
  using Base = StagedEpilogue<StagedTile<Orientation::kPixelsLeft, kColumns>,
                              Orientation::kPixelsLeft, kColumns>;

 public:
  using Base::Base;

  // While the products run: the last store has read the staging, for whom the others wait.
  RF_DEVICE void begin() const { this->end(); }

  RF_DEVICE void finish(const float (&d)[kColumns / 2], const ptx::TensorMap* out,
                        const PhasePlace& place, int32_t channels) const {
    this->meet();
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        words[m] = narrow_pair<T>(d[8 * i + 2 * m], d[8 * i + 2 * m + 1]);
      }
      this->staged_.store(i, words);
    }
    this->send(this->staged_, out, place, channels);
  }
};

// One tile's sums, see turned_products.h; rows: bytes from the tile's first row to the warpgroup's.
// Without steps they are zeros.
template <class T, class Shape, class Operand, class Begin>
RF_DEVICE void sum_turned(float (&d)[Shape::kColumns / 2], const RingOf<Shape>& ring,
                          RingPlace<Shape::kStages>& at, ptx::SharedAddress shared, uint32_t rows,
                          int steps, bool releases, Operand& left, const Begin& begin) {
  clear(d);
  ptx::wgmma_pin(d);
  if (steps == 0) {
    begin();
    return;
  }
  const StagePlaces places{Shape::kPixelsAt + rows, Shape::kMaskAt + rows, Shape::kFiltersAt};
  sum_products<T, Shape>(d, ring, at, shared, places, steps, releases, left, begin);
}

// A warpgroup's rows of the block's tile begin at `row`.
template <class Shape>
RF_DEVICE PhasePlace place_of(const PhasedWalk& walk, uint32_t row, bool apart) {
  const TmaTile tile = own_tile<Shape>(walk);
  return phase_place({tile.channels * Shape::kChannels, tile.group,
                      tile.pixels * Shape::kPixels + static_cast<int32_t>(row)},
                     walk.convolution(), apart);
}

template <class T, class Shape>
RF_DEVICE void consume_gradients(const ConvDgradTmaArguments& arguments, const RingOf<Shape>& ring,
                                 ptx::SharedAddress shared, PhasedWalk walk, uint32_t consumer,
                                 uint32_t thread) {
  DgradStore<T, Shape::kColumns> store(
      {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0, 0,
       static_cast<int>(1 + consumer)},
      thread);
  const ConvTmaArguments& all = arguments.phases[0].conv;
  MaskedOperand<T> left(all.scale, all.reduction.channels, arguments.masked, thread);
  const uint32_t row = consumer * kWarpgroupRows;
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  for (; !walk.done(); walk.next()) {
    const ConvTmaArguments& conv = walk.convolution();
    const PhasePlace place = place_of<Shape>(walk, row, arguments.apart);
    left.start(place.group);
    sum_turned<T, Shape>(d, ring, at, shared, row * kStepRowBytes, conv.steps,
                         thread % 32 < Shape::kFilterSharing, left, [&] { store.begin(); });
    store.finish(d, &conv.out, place, conv.channels);
  }
  store.end();
}

// The producer's steps, of all tiles.
template <class T, class Shape>
RF_DEVICE void produce_gradients(const ConvDgradTmaArguments& arguments, const RingOf<Shape>& ring,
                                 ptx::SharedAddress shared, const PhasedWalk& walk) {
  const auto stage_of = [&](const RingPlace<Shape::kStages>& at) {
    return shared + at.stage * Shape::kStageBytes;
  };
  RingPlace<Shape::kStages> at;
  DgradSteps<T, Shape> steps(arguments, walk);
  if constexpr (Shape::kSharing == 1) {
    for (; !steps.done(); steps.next(), at.next()) {
      ring.acquire(at, steps.bytes());
      steps.load_pixels(stage_of(at), ring.full(at));
      steps.load_filters(stage_of(at), ring.full(at));
    }
  } else {
    // A step's pixels have been taken before the products of the step ahead end: what the others
    // are told of the next stage's comes before the wait for the filters' part of this one.
    RingPlace<Shape::kStages> next = at;
    int unused = Shape::kStages;  // stages ahead of `next` that nothing has been in
    for (; !steps.done(); steps.next()) {
      at = next;
      ring.acquire_turned(at, steps.bytes());
      steps.load_pixels(stage_of(at), ring.full(at));
      next.next();
      if (--unused <= 0) ring.pass(next);
      ring.acquire_read(at);
      steps.load_filters(stage_of(at), ring.full(at));
    }
  }
}

// A block's life: barriers, a thread that asks, warpgroups that multiply. prepare(): what one
// thread does beside; consume: of (ring, walk, which warpgroup, thread of it).
template <class T, class Shape, class Prepare, class Consume>
RF_DEVICE void run_gradients(const ConvDgradTmaArguments& arguments, ptx::SharedAddress shared,
                             const Prepare& prepare, const Consume& consume) {
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  // Each role makes its own: of one for all ptxas would keep registers in all of them.
  const auto walk = [&] {
    return PhasedWalk(arguments, static_cast<int32_t>(blockIdx.x / Shape::kSharing),
                      static_cast<int32_t>(gridDim.x / Shape::kSharing));
  };
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.phases[0].conv.weight);
    for (int i = 0; i < arguments.count; ++i) {
      const DgradPhase& phase = arguments.phases[i];
      ptx::tma_prefetch(&phase.conv.out);
      if (phase.conv.steps == 0) continue;
      ptx::tma_prefetch(&phase.conv.x);
      if (arguments.masked) ptx::tma_prefetch(&phase.y);
    }
    ring.init(Shape::kReaders);
    prepare();
    ptx::fence_mbarrier_init();
  }
  if constexpr (Shape::kSharing > 1) {
    ptx::cluster_sync();  // nothing is copied to the others before their barriers are there
  } else {
    ptx::sync_threads();
  }
  take_roles([&] { produce_gradients<T, Shape>(arguments, ring, shared, walk()); },
             [&](uint32_t consumer, uint32_t thread) { consume(ring, walk(), consumer, thread); });
  // None ends while others tell it what they have read.
  if constexpr (Shape::kSharing > 1) ptx::cluster_sync();
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_dgrad_tma_kernel(const __grid_constant__ ConvDgradTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  run_gradients<T, Shape>(
      arguments, shared, [] {},
      [&](const RingOf<Shape>& ring, const PhasedWalk& walk, uint32_t consumer, uint32_t thread) {
        consume_gradients<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
