// A warpgroup that has more channels of a tile than the 64 rows of its products: sums, and what is
// measured of them, 64 channels at a time.
#pragma once

#include <cstdint>

#include "../ptx/wgmma.h"
#include "pipeline.h"
#include "stats_walk.h"
#include "walk_moments.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_shape.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Of a warpgroup's channels; where it has one half, nobody touches the other's moments.
constexpr int kMostHalves = 2;

// The sums of one tile, of each half of the channels.
template <class Shape>
using HalvesSums = float[Shape::kHalves][Shape::kColumns / 2];

// One tile's sums, step after step of a ring. What a kernel does of its own, as `way` has it:
//   filters(step, at), pixels(at)  where the warpgroup's filters begin, and the tile's pixels
//   asked(step, at)                behind the asking for a step's products
//   begin()                        while the first step's run
//   ended()                        when those of the last one have been asked for
//   release(at, last)              a step's products have been waited for; `last`: of the tile
template <class T, class Shape, class Way>
RF_DEVICE void sum_halves(HalvesSums<Shape>& d, const RingOf<Shape>& ring,
                          RingPlace<Shape::kStages>& at, int steps, const Way& way) {
  RingPlace<Shape::kStages> before = at;
#pragma unroll
  for (auto& half : d) ptx::wgmma_pin(half);
  for (int step = 0; step < steps; ++step) {
    ring.wait(at);
    ptx::wgmma_fence();
#pragma unroll
    for (int half = 0; half < Shape::kHalves; ++half) {
      multiply_step<T>(d[half], way.filters(step, at) + half * kWarpgroupRows * kStepRowBytes,
                       way.pixels(at), step > 0);
    }
    ptx::wgmma_commit_group();
    way.asked(step, at);
    if (step == 0) {
      way.begin();
    } else {
      ptx::wgmma_wait_group<1>();
      way.release(before, false);
    }
    before = at;
    at.next();
  }
  way.ended();
  ptx::wgmma_wait_group<0>();
#pragma unroll
  for (auto& half : d) ptx::wgmma_pin(half);
  way.release(before, true);
}

// The part of a place that a half of the channels has.
RF_DEVICE OutputPlace half_of(OutputPlace place, int half) {
  place.channel += half * kWarpgroupRows;
  return place;
}

// Stores and measures a tile's halves, as far as their channels exist. Measured: a WalkMoments, all
// with one staging; of the first one `begin` has been called. d: pinned behind its wait.
template <class Shape, class Measured>
RF_DEVICE void finish_halves(HalvesSums<Shape>& d, Measured (&moments)[kMostHalves],
                             const ConvTmaArguments& conv, const OutputPlace& place) {
  static_assert(Shape::kHalves <= kMostHalves);
  const int32_t left = conv.grid.pixels - place.pixel;
#pragma unroll
  for (int half = 0; half < Shape::kHalves; ++half) {
    const OutputPlace part = half_of(place, half);
    if (part.channel >= conv.channels) break;
    // The other half's store reads the staging first.
    if (half > 0) moments[half].begin();
    moments[half].finish(d[half], &conv.out, part, conv.channels,
                         left < Shape::kPixels ? left : Shape::kPixels);
  }
}

// Behind the last tile of a walk that began at `first`. A part has the number of its first tile of
// pixels.
template <class Shape, class Measured>
RF_DEVICE void leave_halves(const Measured (&moments)[kMostHalves],
                            const ConvStatsTmaArguments& arguments, const OutputPlace& first) {
  const ConvTmaArguments& conv = arguments.conv;
#pragma unroll
  for (int half = 0; half < Shape::kHalves; ++half) {
    const OutputPlace part = half_of(first, half);
    if (part.channel >= conv.channels) break;
    const MeasuredColumn where{
        static_cast<uint32_t>(part.group * arguments.columns + part.channel / kWarpgroupRows),
        part.group * conv.channels + part.channel, conv.channels - part.channel};
    moments[half].leave(arguments, where, part.pixel / Shape::kPixels);
  }
}

#endif

}  // namespace resnet_fused
