// conv_bn_stats on the GPU, for sm_90a: the convolution of conv_bn_act_sm90.cuh, whose raw output
// is stored and measured, and whose pixels may be read through the BatchNorm and ReLU of the layer
// before.
//
// A block's tiles are all of the same channels: the grid is a multiple of the tiles of channels. So
// each consumer leaves one part of its channels' statistics behind its last tile, and the last one
// of a column of 64 channels merges the parts.
#pragma once

#include <cstdint>

#include "../device/normed_steps.h"
#include "../device/stats_walk.h"
#include "../device/walk_moments.h"
#include "conv_bn_act_sm90.cuh"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
RF_DEVICE void consume_measured(const ConvStatsTmaArguments& arguments, const RingOf<Shape>& ring,
                                ptx::SharedAddress shared, TileWalk walk, uint32_t consumer,
                                uint32_t thread) {
  const ConvTmaArguments& conv = arguments.conv;
  WalkMoments<T, Shape::kColumns> moments(
      {shared + Shape::kStagingAt + consumer * Shape::kStagingBytes, 0, 0,
       static_cast<int>(1 + consumer)},
      thread);
  // Of a cluster the last tile may lie behind the last pixel; a warpgroup's channels behind the
  // last one.
  const auto exists = [&](const OutputPlace& place) {
    return place.pixel < conv.grid.pixels && place.channel < conv.channels;
  };
  consume_tiles<T, Shape>(
      conv, ring, shared, walk, consumer, thread, [&](const OutputPlace&) { moments.begin(); },
      [&](float (&d)[Shape::kColumns / 2], const OutputPlace& place) {
        if (!exists(place)) return;
        const int32_t left = conv.grid.pixels - place.pixel;
        moments.finish(d, &conv.out, place, conv.channels,
                       left < Shape::kPixels ? left : Shape::kPixels);
      });
  skip_others<Shape>(walk, consumer);
  if (walk.done()) return;
  const OutputPlace first = place_of<Shape>(walk, consumer);
  // A part has the number of its first tile of pixels.
  if (!exists(first)) return;
  const MeasuredColumn where{
      static_cast<uint32_t>(first.group * arguments.columns + first.channel / kWarpgroupRows),
      first.group * conv.channels + first.channel, conv.channels - first.channel};
  moments.leave(arguments, where, first.pixel / Shape::kPixels);
}

#endif

// For any other architecture it is empty, and no plan chooses it. Shape: a WarpgroupShape, or a
// TransformShape of one where a norm is read through.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_stats_tma_kernel(const __grid_constant__ ConvStatsTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  static_assert(!Shape::kPixelsLeft, "a warpgroup has all pixels of a channel");
  const auto consume = [&](const RingOf<Shape>& ring, ptx::SharedAddress shared,
                           const TileWalk& walk, uint32_t consumer, uint32_t thread) {
    consume_measured<T, Shape>(arguments, ring, shared, walk, consumer, thread);
  };
  if constexpr (Shape::kTransforms) {
    run_convolution<T, Shape>(
        arguments.conv, consume,
        [&](const RingOf<Shape>& ring, ptx::SharedAddress shared, const TileWalk& walk,
            uint32_t thread) {
          transform_stages<Shape>(
              ring, shared, NormedSteps<T, Shape>(arguments.conv, arguments.norm, walk, thread));
        });
  } else {
    run_convolution<T, Shape>(arguments.conv, consume);
  }
#endif
}

}  // namespace resnet_fused
