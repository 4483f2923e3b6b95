// conv_dgrad on the GPU, for sm_90a: the gradient of a convolution's input by wgmma, fed by TMA,
// where the stride is 1.
//
//     dx[m, c] = sum over e of (scale * dz)[m, e] * filter[e, c]
//
// M: input pixels, N: input channels of a group, reduction: taps and output channels of the group.
// A block stays for many tiles. One thread asks for steps of 64 channels of one tap: of dy, of y,
// whose zeros beside the image let nothing pass, and of the filters, which are read across. Two
// warpgroups turn dy in registers, each its 64 rows, and multiply; while one turns a step the
// products of its last one and of the other run.
#pragma once

#include <cstdint>

#include "../device/dgrad_tma.h"
#include "../device/masked_operand.h"
#include "../device/pair.h"
#include "../device/tap_steps.h"
#include "../device/turned_products.h"
#include "../device/warpgroup_epilogue.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The producer's way through the steps of its block's tiles. The first tap of dy's walk meets the
// filter's last one.
template <class T, class Shape>
class DgradSteps : public TapSteps<T, Shape> {
 public:
  RF_DEVICE DgradSteps(const ConvDgradTmaArguments& arguments, const TileWalk& walk)
      : TapSteps<T, Shape>(arguments.conv, walk), whole_(arguments) {}

  RF_DEVICE uint32_t bytes() const {
    return Shape::kStageBytes - (whole_.masked ? 0 : Shape::kPixelBytes);
  }

  RF_DEVICE void load(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const Column& at = this->column_;
    const Reduction& taps = this->arguments_.reduction;
    this->load_taps(&this->arguments_.x, stage + Shape::kPixelsAt, full);
    if (whole_.masked) this->load_taps(&whole_.y, stage + Shape::kMaskAt, full);
    const int32_t first = this->tile_.channels * Shape::kChannels;
#pragma unroll 1
    for (int i = 0; i < Shape::kChannels / kStepElements; ++i) {
      ptx::tma_load(stage + Shape::kFiltersAt + i * kAcrossBoxBytes, &this->arguments_.weight,
                    {first + i * kStepElements, taps.taps_s - 1 - at.s, taps.taps_r - 1 - at.r,
                     this->channel_ + at.c},
                    full);
    }
  }

 private:
  const ConvDgradTmaArguments& whole_;
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
                        const OutputPlace& place, int32_t channels) const {
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
template <class T, class Shape, class Operand, class Begin>
RF_DEVICE void sum_turned(float (&d)[Shape::kColumns / 2], const RingOf<Shape>& ring,
                          RingPlace<Shape::kStages>& at, ptx::SharedAddress shared, uint32_t rows,
                          int steps, bool releases, Operand& left, const Begin& begin) {
  const StagePlaces places{Shape::kPixelsAt + rows, Shape::kMaskAt + rows, Shape::kFiltersAt};
  sum_products<T, Shape>(d, ring, at, shared, places, steps, releases, left, begin);
}

template <class T, class Shape>
RF_DEVICE void consume_gradients(const ConvDgradTmaArguments& arguments, const RingOf<Shape>& ring,
                                 ptx::SharedAddress shared, TileWalk walk, uint32_t consumer,
                                 uint32_t thread) {
  const ConvTmaArguments& conv = arguments.conv;
  DgradStore<T, Shape::kColumns> store(
      {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0, 0,
       static_cast<int>(1 + consumer)},
      thread);
  MaskedOperand<T> left(conv.scale, conv.reduction.channels, arguments.masked, thread);
  const uint32_t row = consumer * kWarpgroupRows;
  RingPlace<Shape::kStages> at;
  float d[Shape::kColumns / 2];
  clear(d);
  for (; !walk.done(); walk.next()) {
    const TmaTile tile = walk.tile();
    const OutputPlace place{tile.channels * Shape::kChannels, tile.group,
                            tile.pixels * Shape::kPixels + static_cast<int32_t>(row)};
    left.start(tile.group);
    sum_turned<T, Shape>(d, ring, at, shared, row * kStepRowBytes, conv.steps, thread % 32 == 0,
                         left, [&] { store.begin(); });
    store.finish(d, &conv.out, place, conv.channels);
  }
  store.end();
}

// A block's life: barriers, a thread that asks, warpgroups that multiply. prepare(): what one
// thread does beside; consume: of (ring, walk, which warpgroup, thread of it).
template <class T, class Shape, class Prepare, class Consume>
RF_DEVICE void run_gradients(const ConvDgradTmaArguments& arguments, ptx::SharedAddress shared,
                             const Prepare& prepare, const Consume& consume) {
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const TileWalk walk(arguments.conv.tiles, arguments.conv.reverse,
                      static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x));
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.conv.weight);
    ptx::tma_prefetch(&arguments.conv.x);
    ptx::tma_prefetch(&arguments.conv.out);
    if (arguments.masked) ptx::tma_prefetch(&arguments.y);
    ring.init(Shape::kReaders);
    prepare();
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  take_roles(
      [&] {
        RingPlace<Shape::kStages> at;
        for (DgradSteps<T, Shape> steps(arguments, walk); !steps.done(); steps.next(), at.next()) {
          ring.acquire(at, steps.bytes());
          steps.load(shared + at.stage * Shape::kStageBytes, ring.full(at));
        }
      },
      [&](uint32_t consumer, uint32_t thread) { consume(ring, walk, consumer, thread); });
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
      [&](const RingOf<Shape>& ring, const TileWalk& walk, uint32_t consumer, uint32_t thread) {
        consume_gradients<T, Shape>(arguments, ring, shared, walk, consumer, thread);
      });
#endif
}

}  // namespace resnet_fused
