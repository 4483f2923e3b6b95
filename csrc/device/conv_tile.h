// What a block does for one tile of conv_bn_act on mma.sync, or where the reduction is cut for one
// part of a tile's sums.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "conv_geometry.h"
#include "conv_loader.h"
#include "main_loop.h"

namespace resnet_fused {

// `part()`: of the tiles and their splits; asked for here, behind the thread's own place, it keeps
// fewer registers alive. `ready()` is called once, when filters, which are constants, have been
// asked for: behind it anything may be read, and written. `merge(sums, tile, place)` is called for
// a part, whose sums it takes; whether they are the whole tile's now, to be finished here.
template <class T, class Shape, LoadWidth kWidth, class Part, class Ready, class Merge>
RF_DEVICE void compute_tile(const ConvBnActArguments& arguments, const Part& part,
                            const Ready& ready, const Merge& merge) {
  using Loader = ConvLoader<T, Shape, kWidth>;
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const Tile tile = tile_of(part(), arguments.tiles);
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
  ready();
  Sums<Shape> sums;
  sums.clear();
  run_main_loop<T>(sums, ring, steps, left, right, loader, [&](int piece) {
    if (!split) epilogue.prefetch(piece);
  });
  if (split && !merge(sums, tile, place)) return;
  epilogue.finish(sums, place, split ? 0 : Shape::kStages - 1);
}

}  // namespace resnet_fused
