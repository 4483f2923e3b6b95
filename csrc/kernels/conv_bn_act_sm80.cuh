// conv_bn_act on the GPU, for sm_80 and later: implicit GEMM on mma.sync, with BatchNorm's scale
// and shift, the shortcut and the ReLU in its epilogue.
//
//     out[m, k] = act(scale[k] * sum over e of pixel[m, e] * filter[k, e] + shift[k] + residual[m,
//     k])
//
// M: output pixels, N: output channels of a group, reduction: the taps and channels of a filter.
// The pixels' matrix exists nowhere: each step gathers its columns from the image. A block computes
// one tile, or with splits one part of a tile's sums. Filters come before the kernel ahead has
// ended, everything else after that.
#pragma once

#include <cstdint>

#include "../device/conv_epilogue.h"
#include "../device/conv_geometry.h"
#include "../device/conv_loader.h"
#include "../device/dependent.h"
#include "../device/main_loop.h"
#include "../device/split_reduction.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_bn_act_kernel(const __grid_constant__ ConvBnActArguments arguments) {
  using Loader = ConvLoader<T, Shape, kWidth>;
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const uint32_t block = arguments.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Tile tile = tile_of(block, arguments.tiles);
  const int first_step = tile.split * arguments.steps_each;
  const int steps_left = arguments.steps - first_step;
  const int steps = steps_left < arguments.steps_each ? steps_left : arguments.steps_each;
  const bool split = arguments.tiles.splits > 1;

  Loader loader(arguments.operands, tile, first_step * LoadPattern<T, Shape, kWidth>::kStep,
                place.thread);
  const ConvEpilogue<T, Shape> epilogue(arguments.output, arguments.operands.grid, tile, ring,
                                        steps % Shape::kStages, place.thread);
  const KMajorFragments<Side::kLeft, Shape::kBlocksM> left(place.row, place.lane);
  const KMajorFragments<Side::kRight, Shape::kBlocksN> right(place.column, place.lane);
  constexpr int kAhead = Shape::kStages - 1;
  loader.issue_filters(ring, steps < kAhead ? steps : kAhead);
  prefetch_share(arguments.operands.weight, arguments.prefetch_bytes);
  wait_for_ahead(arguments.dependent);
  Sums<Shape> sums;
  sums.clear();
  run_main_loop<T>(sums, ring, steps, left, right, loader, [&](int piece) {
    if (!split) epilogue.prefetch(piece);
  });
  if (split && !merge_splits(sums, arguments.workspace, tile.index, tile.split,
                             arguments.tiles.splits, ring, place.thread)) {
    return;
  }
  epilogue.finish(sums, place, split ? 0 : Shape::kStages - 1);
}

}  // namespace resnet_fused
