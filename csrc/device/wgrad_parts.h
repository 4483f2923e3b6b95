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
RF_DEVICE T* dweight_at(const WgradProduct& product, int32_t group, int32_t row, int32_t column) {
  if (row >= product.channels_out || column >= product.columns_each) return nullptr;
  const Column at = column_of(column, product.columns);
  if (at.c >= product.channels_in || at.s >= product.taps_s) return nullptr;
  const int64_t k = group * product.channels_out + row;
  return static_cast<T*>(product.dweight) + k * product.dweight_k +
         offset_of(at, product.dweight_columns);
}

RF_DEVICE float scale_of(const WgradProduct& product, int32_t group, int32_t row) {
  if (row >= product.channels_out) return 0.0f;
  if (product.scale == nullptr) return 1.0f;
  return ptx::load_global_read_only(product.scale + group * product.channels_out + row);
}

// A split's part of the reduction.
struct WgradPart {
  int32_t first_pixel;
  int32_t steps;
};

template <class T, class Shape>
RF_DEVICE WgradPart wgrad_part(const WgradProduct& product, const Tile& tile) {
  constexpr int kStep = Shape::kStepBytes / static_cast<int>(sizeof(T));
  const int32_t first = tile.split * product.steps_each;
  const int32_t left = product.steps - first;
  return WgradPart{first * kStep, left < product.steps_each ? left : product.steps_each};
}

template <class T, class Shape, class Loader>
RF_DEVICE void add_wgrad_products(Sums<Shape>& sums, Loader& loader, int32_t steps,
                                  ptx::SharedAddress ring, const Place<Shape>& place) {
  const MnMajorFragments<T, Side::kLeft, Shape::kBlocksM, Shape::kM> left(place.row, place.lane);
  const MnMajorFragments<T, Side::kRight, Shape::kBlocksN, Shape::kN> right(place.column,
                                                                            place.lane);
  run_main_loop<T>(sums, ring, steps, left, right, loader, [](int) {});
}

// Leaves a thread's sums. sum(i): the vector i of it, rows g and g + 8 of two columns, as a product
// of 16 rows by 8 columns has them.
template <class Shape, class Sum>
RF_DEVICE void leave_wgrad_vectors(const WgradProduct& product, const Tile& tile, uint32_t thread,
                                   const Sum& sum) {
  constexpr int kVectors = Shape::kM * Shape::kN / (4 * Shape::kThreads);
  const int64_t first =
      (static_cast<int64_t>(tile.index) * product.tiles.splits + tile.split) * kVectors;
  auto* to = reinterpret_cast<Vector<float>*>(product.partial) + first * Shape::kThreads;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) ptx::store_global(to + i * Shape::kThreads + thread, sum(i));
}

template <class Shape>
RF_DEVICE void leave_wgrad_sums(const Sums<Shape>& sums, const WgradProduct& product,
                                const Tile& tile, uint32_t thread) {
  constexpr int kColumns = 2 * Shape::kBlocksN;
  leave_wgrad_vectors<Shape>(product, tile, thread, [&](int i) {
    const float (&sum)[4] = sums.value[i / kColumns][i % kColumns];
    return Vector<float>{{sum[0], sum[1], sum[2], sum[3]}};
  });
}

}  // namespace resnet_fused
