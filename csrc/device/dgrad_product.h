// The product that a block of a gradient of an input adds up.
#pragma once

#include "dgrad_loader.h"
#include "gradient_geometry.h"
#include "main_loop.h"
#include "mn_major.h"

namespace resnet_fused {

// Adds this block's part of the reduction to `sums`; of a phase without taps there is none. Loader:
// a DgradLoader that knows what to do with what has arrived.
template <class T, class Shape, LoadWidth kWidth, class Loader>
RF_DEVICE void add_gradients(Sums<Shape>& sums, const ConvDgradArguments& arguments,
                             const DgradPlace& where, int split, ptx::SharedAddress ring,
                             const Place<Shape>& place) {
  constexpr int kStep = LoadPattern<T, Shape, kWidth>::kStep;
  const int steps_of_all =
      (where.h.taps * where.w.taps * arguments.channels_out + kStep - 1) / kStep;
  const int each = (steps_of_all + arguments.tiles.splits - 1) / arguments.tiles.splits;
  const int first = split * each;
  const int steps = steps_of_all - first < each ? steps_of_all - first : each;
  if (steps <= 0) return;
  Loader loader(arguments, where, first * kStep, place.thread);
  const KMajorFragments<Side::kLeft, Shape::kBlocksM> left(place.row, place.lane);
  const MnMajorFragments<T, Side::kRight, Shape::kBlocksN, Shape::kN> right(place.column,
                                                                            place.lane);
  run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});
}

}  // namespace resnet_fused
