// conv_bn_stats of an image of a few channels, for sm_80 and later: the first layer's convolution,
// by rows of the image.
//
//     y[m, k] = sum over (r, s, c) of x[pixel of m's tap (r, s), c] * filter[k, (r, s, c)]
//     mean, M2 of every channel, of the rounded y
//
// M: output pixels, N: output channels, reduction: rows of taps, of 8 taps of 4 channels. A block
// brings its filters once and stays for many tiles of pixels: it loads what a tile's taps read of
// the image, each element once, multiplies from there, and measures as conv_bn_stats' other kernels
// do.
#pragma once

#include <cstdint>

#include "../device/image_window.h"
#include "../device/main_loop.h"
#include "../device/resident_blocks.h"
#include "../device/stats_finish.h"

namespace resnet_fused {

// The products of a tile, whose window lies in shared memory as its filters do.
template <class T, class Shape>
RF_DEVICE void multiply_image_window(Sums<Shape>& sums, const ImageStatsArguments& arguments,
                                     int32_t first, ptx::SharedAddress filters,
                                     ptx::SharedAddress window, const Place<Shape>& place) {
  const ConvOperands& operands = arguments.stats.operands;
  const ImageWindowFragments<Shape> left(operands, first, place.row, place.lane);
  const KMajorFragments<Side::kRight, Shape::kBlocksN> right(place.column, place.lane);
  const uint32_t row_bytes = static_cast<uint32_t>(arguments.chunks) * kChunkBytes;
  Fragments<Shape> fragments;
  const auto load_first = [&] {
    left.load(fragments.left[0], window, 0);
    right.load_block(fragments.right[0], filters, 0, 0);
  };
  load_first();
  const int32_t rows = operands.reduction.taps_r;
  for (int32_t r = 0; r < rows; ++r) {
    multiply_step<T>(sums, fragments, left, right, window, filters, [&] {
      window += row_bytes;
      filters += Shape::kFilterRowBytes;
      if (r + 1 < rows) load_first();
    });
  }
}

// Block b: filters of column b % tiles_n, and of the tiles of pixels every walker-th one.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_stats_image_kernel(const __grid_constant__ ImageStatsArguments arguments) {
  const ConvBnStatsArguments& stats = arguments.stats;
  const ptx::SharedAddress filters = ptx::shared_address(ptx::dynamic_shared());
  const ptx::SharedAddress window = filters + Shape::kFiltersBytes;
  const auto tiles_n = static_cast<uint32_t>(stats.tiles.tiles_n);
  stage_image_filters<T, ImageFilterTiles<Shape>, Shape::kN>(
      image_filters(stats.operands), blockIdx.x % tiles_n * Shape::kN, filters, threadIdx.x);
  for (auto m = static_cast<int32_t>(blockIdx.x / tiles_n); m < stats.tiles.tiles_m;
       m += stats.walkers) {
    uint32_t thread = threadIdx.x;
    ptx::keep(thread);  // what is made of it is not worth a register through the end
    const auto place = Place<Shape>::of(thread);
    const int32_t first = m * Shape::kM;
    load_image_window<T, Shape>(arguments, first, window, thread);
    ptx::sync_threads();  // the filters have come, too
    Sums<Shape> sums;
    sums.clear();
    multiply_image_window<T>(sums, arguments, first, filters, window, place);
    ptx::sync_threads();  // results take the window's place
    finish_stats<T>(sums, stats, window, [&] {
      uint32_t block = blockIdx.x;
      ptx::keep(block);  // likewise
      return Tile{m, static_cast<int32_t>(block % tiles_n), 0, 0, 0};
    });
    ptx::sync_threads();  // and the next window theirs
  }
}

}  // namespace resnet_fused
