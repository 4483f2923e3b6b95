// bn_add_act_conv_stats on the GPU, for sm_80 and later: a residual block's end, made as the next
// block's 1x1 convolution reads.
//
//     out[m, c] = rnd(relu(scale[c] * y[m, c] + shift[c] + r[m, c]))
//     z[m, k] = sum over c of out[m, c] * filter[k, c]
//     mean, M2 of every channel, of the rounded z
//
// As conv_bn_stats, with which it shares everything but the loader: see block_end_loader.h.
#pragma once

#include "../device/block_end_loader.h"
#include "../device/main_loop.h"
#include "../device/resident_blocks.h"
#include "../device/stats_finish.h"

namespace resnet_fused {

template <class T, class Shape, bool kProjected>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    bn_add_act_conv_stats_kernel(const __grid_constant__ BlockEndArguments arguments) {
  const ConvBnStatsArguments& stats = arguments.stats;
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  Sums<Shape> sums;
  sums.clear();
  {
    const Tile tile = tile_of_block(stats);
    const auto place = Place<Shape>::mine();
    const int32_t first = tile.split * stats.steps_each;
    const int32_t left_over = stats.steps - first;
    const int32_t steps = left_over < stats.steps_each ? left_over : stats.steps_each;
    const KMajorFragments<Side::kLeft, Shape::kBlocksM> left(place.row, place.lane);
    const KMajorFragments<Side::kRight, Shape::kBlocksN> right(place.column, place.lane);
    BlockEndLoader<T, Shape, kProjected> loader(arguments, tile, first, place.thread);
    run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});
  }
  finish_stats<T>(sums, stats, ring);
}

}  // namespace resnet_fused
