// conv_bn_stats on the GPU, for sm_80 and later: implicit GEMM on mma.sync that reads through the
// BatchNorm and ReLU of the layer before, and measures what it stores.
//
//     y[m, k] = sum over e of relu(scale[c] * pixel[m, e] + shift[c]) * filter[k, e]
//     mean, M2 of every channel, of the rounded y
//
// M: output pixels, N: output channels of a group, reduction: the taps and channels of a filter. A
// block computes and measures one tile, or with splits one part of a tile's sums; the last block of
// a column of tiles merges what the others have measured.
#pragma once

#include <cstdint>

#include "../device/conv_loader.h"
#include "../device/main_loop.h"
#include "../device/normed_halo.h"
#include "../device/normed_loader.h"
#include "../device/resident_blocks.h"
#include "../device/stats_finish.h"
#include "../device/stats_geometry.h"

namespace resnet_fused {

// How pixels are read: for each tap, as they are or through a BatchNorm; or, either way, once for
// all taps of a 3x3, whose steps are slices of channels.
enum class StatsSource { kPlain, kNormed, kHalo };

// Adds this block's part of the reduction to `sums`.
template <class T, class Shape, LoadWidth kWidth, StatsSource kSource>
RF_DEVICE void add_products(Sums<Shape>& sums, const ConvBnStatsArguments& arguments,
                            const Tile& tile, ptx::SharedAddress ring) {
  const auto place = Place<Shape>::mine();
  const int first = tile.split * arguments.steps_each;
  const int left_over = arguments.steps - first;
  const int steps = left_over < arguments.steps_each ? left_over : arguments.steps_each;
  const KMajorFragments<Side::kRight, Shape::kBlocksN> right(place.column, place.lane);
  if constexpr (kSource == StatsSource::kHalo) {
    using Loader = HaloLoader<T, Shape, NormedHalo<T, Shape>>;
    Loader loader({arguments, tile, place.thread}, tile.m * Shape::kM, first, steps,
                  ring + kStatsSharedBytes<Shape>, place);
    const HaloFragments<Loader, Shape> left{loader};
    loader.begin();
    run_main_loop<T>(sums, ring, steps * kHaloTaps, left, right, loader, [](int) {});
  } else {
    const int32_t element = first * LoadPattern<T, Shape, kWidth>::kStep;
    const auto run = [&](auto& loader) {
      const KMajorFragments<Side::kLeft, Shape::kBlocksM> left(place.row, place.lane);
      constexpr int kAhead = Shape::kStages - 1;
      loader.issue_filters(ring, steps < kAhead ? steps : kAhead);
      run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});
    };
    if constexpr (kSource == StatsSource::kNormed) {
      NormedLoader<T, Shape, kWidth> loader(arguments, tile, element, place.thread);
      run(loader);
    } else {
      ConvLoader<T, Shape, kWidth> loader(arguments.operands, tile, element, place.thread);
      run(loader);
    }
  }
}

template <class T, class Shape, LoadWidth kWidth, StatsSource kSource>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_stats_kernel(const __grid_constant__ ConvBnStatsArguments arguments) {
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  Sums<Shape> sums;
  sums.clear();
  add_products<T, Shape, kWidth, kSource>(sums, arguments, tile_of_block(arguments), ring);
  finish_stats<T>(sums, arguments, ring);
}

}  // namespace resnet_fused
