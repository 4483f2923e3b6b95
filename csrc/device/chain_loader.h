// What a chain of convolutions reads: the pixels' rows once, and with each step of `out` the
// filters that make it, those that read it, their scales and shifts, and the shortcut.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "chain_geometry.h"
#include "main_loop.h"
#include "operand_tile.h"

namespace resnet_fused {

static_assert(KMajor::kRowBytes == kChainStepBytes);

// The rows that a thread moves 16 bytes of: those of its warp, eight rows apart, at one place
// within a step.
template <class Shape>
class ChainRows {
 public:
  RF_DEVICE ChainRows(int32_t tile, const PixelGrid& grid, const Place<Shape>& place)
      : grid_(grid),
        row_(place.row + place.lane / kLoadLanes),
        first_(tile * Shape::kM + static_cast<int32_t>(row_)),
        unit_(static_cast<int32_t>(place.lane % kLoadLanes)),
        place_(KMajor::offset(row_, place.lane % kLoadLanes)) {
    ptx::keep(place_);
  }

  // Which 16 bytes of a step's channels are the thread's.
  RF_DEVICE int32_t unit() const { return unit_; }
  RF_DEVICE const PixelGrid& grid() const { return grid_; }
  RF_DEVICE bool known(int i) const { return first_ + i * 8 < grid_.pixels; }
  RF_DEVICE Pixel pixel(int i) const { return pixel_of(known(i) ? first_ + i * 8 : 0, grid_); }
  // Where row i's 16 bytes lie in a tile [kM][step]: eight rows further the swizzle is the same.
  RF_DEVICE uint32_t at(int i) const { return place_ + static_cast<uint32_t>(i) * kSlabBytes<8>; }

 private:
  const PixelGrid& grid_;
  uint32_t row_;
  int32_t first_;
  int32_t unit_;
  uint32_t place_;
};

// `units` 16-byte units behind `data`.
RF_DEVICE const unsigned char* wide_at(const void* data, int32_t units) {
  return static_cast<const unsigned char*>(data) + int64_t{units} * kChunkBytes;
}

// kFilters rows from `first` on, of `slabs` steps of their reduction from 16-byte unit `first_unit`
// on; `offset`: 16 bytes further.
template <class Shape, int kFilters>
RF_DEVICE void copy_filters(ptx::SharedAddress to, const ChainFilters& filters, int32_t first,
                            int32_t first_unit, int slabs, uint32_t thread, int32_t offset = 0) {
  constexpr uint32_t kUnits = kFilters * kLoadLanes;  // of a slab
#pragma unroll 1
  for (uint32_t i = thread; i < kUnits * static_cast<uint32_t>(slabs); i += Shape::kThreads) {
    const uint32_t slab = i / kUnits;
    const uint32_t row = i / kLoadLanes % kFilters;
    const uint32_t lane = i % kLoadLanes;
    const int32_t filter = first + static_cast<int32_t>(row);
    const int32_t unit = first_unit + static_cast<int32_t>(slab * kLoadLanes + lane);
    const bool valid = filter < filters.filters && unit < filters.units;
    ptx::cp_async<kChunkBytes>(to + slab * kSlabBytes<kFilters> + KMajor::offset(row, lane),
                               wide_at(filters.data, filter * filters.stride + unit + offset),
                               valid);
  }
}

template <class Shape>
class ChainLoader {
  using Rows = ChainRows<Shape>;

 public:
  RF_DEVICE ChainLoader(const ConvChainArguments& arguments, const Rows& rows,
                        ptx::SharedAddress shared, uint32_t thread)
      : arguments_(arguments), rows_(rows), shared_(shared), thread_(thread) {
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      residual_[i] = offset_of(rows.pixel(i), arguments.residual.strides) + rows.unit();
      ptx::keep(residual_[i]);
    }
  }

  // All channels of the tile's pixels, of both left sides; of the first one unless a convolution in
  // front makes them.
  RF_DEVICE void issue_rows() const {
    if constexpr (Shape::kFront == 0) copy_rows(shared_, arguments_.x, arguments_.x_slabs);
    copy_rows(projected_rows(), arguments_.projected, arguments_.projected_slabs);
  }

  // What a step of `out` takes.
  RF_DEVICE void issue(int step, int stage) const {
    const ConvChainArguments& a = arguments_;
    const int32_t channel = step * Shape::kN;
    ptx::SharedAddress at = filters_at(stage);
    copy_filters<Shape, Shape::kN>(at, a.weight, channel, 0, a.x_slabs, thread_);
    at += a.x_slabs * kSlabBytes<Shape::kN>;
    copy_filters<Shape, Shape::kN>(at, a.projection, channel, 0, a.projected_slabs, thread_);
    at += a.projected_slabs * kSlabBytes<Shape::kN>;
    if (a.next.filters > 0) {
      copy_filters<Shape, Shape::kNext>(at, a.next, 0, step * kLoadLanes, 1, thread_);
    }
    at += kSlabBytes<Shape::kNext>;
    copy_vectors(at, a.weight, channel);
    if (a.projected_slabs > 0) copy_vectors(at + 2 * kVectorBytes, a.projection, channel);
    if (a.memory.tile != 0) copy_residual(tile_at(stage), step * kLoadLanes);
  }

  RF_DEVICE ptx::SharedAddress projected_rows() const {
    return shared_ + arguments_.memory.projected_at;
  }
  RF_DEVICE ptx::SharedAddress filters_at(int stage) const {
    return shared_ + arguments_.memory.ring_at + stage * arguments_.memory.stage;
  }
  RF_DEVICE ptx::SharedAddress next_filters_at(int stage) const {
    return filters_at(stage) +
           (arguments_.x_slabs + arguments_.projected_slabs) * kSlabBytes<Shape::kN>;
  }
  RF_DEVICE ptx::SharedAddress vectors_at(int stage) const {
    return next_filters_at(stage) + kSlabBytes<Shape::kNext>;
  }
  // The tile of `out`, where its shortcut has come if it is a tensor.
  RF_DEVICE ptx::SharedAddress tile_at(int stage) const {
    return shared_ + arguments_.memory.tiles_at + stage * arguments_.memory.tile;
  }

  static constexpr int kVectorBytes = Shape::kN * 4;

 private:
  RF_DEVICE void copy_rows(ptx::SharedAddress to, const ChainImage& image, int slabs) const {
    if (slabs == 0) return;
    int32_t from[Shape::kRows];
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      from[i] = offset_of(rows_.pixel(i), image.strides);
    }
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      const int32_t unit = slab * kLoadLanes + rows_.unit();
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
        ptx::cp_async<kChunkBytes>(to + slab * kSlabBytes<Shape::kM> + rows_.at(i),
                                   wide_at(image.data, from[i] + unit),
                                   rows_.known(i) && unit < image.units);
      }
    }
  }

  // Scale and shift of a step's channels.
  RF_DEVICE void copy_vectors(ptx::SharedAddress to, const ChainFilters& filters,
                              int32_t first) const {
    if (thread_ >= 2 * Shape::kN) return;
    const int32_t channel = first + static_cast<int32_t>(thread_ % Shape::kN);
    const float* vector = thread_ < Shape::kN ? filters.scale : filters.shift;
    ptx::cp_async<4>(to + thread_ * 4, vector + channel, channel < filters.filters);
  }

  RF_DEVICE void copy_residual(ptx::SharedAddress to, int32_t unit) const {
    const ChainImage& image = arguments_.residual;
    const bool there = unit + rows_.unit() < image.units;
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      ptx::cp_async<kChunkBytes>(to + rows_.at(i), wide_at(image.data, residual_[i] + unit),
                                 rows_.known(i) && there);
    }
  }

  const ConvChainArguments& arguments_;
  const Rows& rows_;
  ptx::SharedAddress shared_;
  uint32_t thread_;
  int32_t residual_[Shape::kRows];  // 16 bytes, from the first pixel's first channel
};

}  // namespace resnet_fused
