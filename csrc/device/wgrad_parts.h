// The parts of a weight's gradient: many blocks share a tile, because its reduction is long and the
// result small. Each adds up a part of the reduction and leaves its sums in a workspace.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_geometry.h"
#include "main_loop.h"
#include "mn_major.h"
#include "vector.h"

namespace resnet_fused {

// Where an element of the gradient lies: row and column of the group; null beyond.
template <class T>
RF_DEVICE T* dweight_at(const ConvWgradArguments& arguments, int32_t group, int32_t row,
                        int32_t column) {
  if (row >= arguments.channels_out || column >= arguments.columns_each) return nullptr;
  const Column at = column_of(column, arguments.columns);
  const Reduction& filter = arguments.filter;
  if (at.c >= filter.channels || at.s >= filter.taps_s || at.r >= filter.taps_r) return nullptr;
  const int64_t k = group * arguments.channels_out + row;
  return static_cast<T*>(arguments.dweight) + k * arguments.dweight_k +
         offset_of(at, arguments.dweight_columns);
}

RF_DEVICE float scale_of(const ConvWgradArguments& arguments, int32_t group, int32_t row) {
  if (row >= arguments.channels_out) return 0.0f;
  if (arguments.scale == nullptr) return 1.0f;
  return ptx::load_global_read_only(arguments.scale + group * arguments.channels_out + row);
}

// A split's part of the reduction.
struct WgradPart {
  int32_t first_pixel;
  int32_t steps;
};

template <class T, class Shape>
RF_DEVICE WgradPart wgrad_part(const ConvWgradArguments& arguments, const Tile& tile) {
  constexpr int kStep = Shape::kStepBytes / static_cast<int>(sizeof(T));
  const int32_t first = tile.split * arguments.steps_each;
  const int32_t left = arguments.steps - first;
  return WgradPart{first * kStep, left < arguments.steps_each ? left : arguments.steps_each};
}

template <class T, class Shape, class Loader>
RF_DEVICE void add_wgrad_products(Sums<Shape>& sums, Loader& loader, int32_t steps,
                                  ptx::SharedAddress ring, const Place<Shape>& place) {
  const MnMajorFragments<T, Side::kLeft, Shape::kBlocksM, Shape::kM> left(place.row, place.lane);
  const MnMajorFragments<T, Side::kRight, Shape::kBlocksN, Shape::kN> right(place.column,
                                                                            place.lane);
  run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});
}

template <class Shape>
RF_DEVICE void leave_wgrad_sums(const Sums<Shape>& sums, const ConvWgradArguments& arguments,
                                const Tile& tile, uint32_t thread) {
  constexpr int kColumns = 2 * Shape::kBlocksN;
  constexpr int kVectors = Shape::kBlocksM * kColumns;
  const int64_t first =
      (static_cast<int64_t>(tile.index) * arguments.tiles.splits + tile.split) * kVectors;
  auto* to = reinterpret_cast<Vector<float>*>(arguments.partial) + first * Shape::kThreads;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float (&sum)[4] = sums.value[i / kColumns][i % kColumns];
    ptx::store_global(to + i * Shape::kThreads + thread,
                      Vector<float>{{sum[0], sum[1], sum[2], sum[3]}});
  }
}

}  // namespace resnet_fused
