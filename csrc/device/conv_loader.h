// Loaders: an operand's rows, from global memory into the K-major tiles of a step.
//
// A thread brings the same 4 bytes x 4 columns or 16 bytes of a row in every step, and rows that
// lie kRowStep apart. Rows beyond the tensor, taps outside of the image and columns behind the end
// of the reduction become zeros, without being read.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_geometry.h"
#include "operand_tile.h"
#include "tile_shape.h"

namespace resnet_fused {

// What a unit is read from: `valid` or zeros.
template <class T>
struct Source {
  const T* from;
  bool valid;
};

// A thread's rows of a K-major tile of kTileRows rows.
template <class T, class Shape, LoadWidth kWidth, int kTileRows>
class RowLoader {
  using Pattern = LoadPattern<T, Shape, kWidth>;

 public:
  static constexpr int kRows = kTileRows / Pattern::kRowStep;
  static_assert(kTileRows % Pattern::kRowStep == 0);

  RF_DEVICE explicit RowLoader(uint32_t thread)
      : chunk_(KMajor::swizzle(thread / Pattern::kLanes) * kChunkBytes) {
    const uint32_t row = thread / Pattern::kLanes * KMajor::kRowBytes;
    const uint32_t lane = thread % Pattern::kLanes * Pattern::kUnitBytes;
    // A wide unit is a chunk; narrow ones share the pass's chunk.
    place_ = row + (kWidth == LoadWidth::kWide ? lane ^ chunk_ : lane);
  }

  // source(i, j): element j of the unit that row i of this thread has in this pass; j is 0 but
  // where two elements make a unit.
  template <class SourceOf>
  RF_DEVICE void issue(ptx::SharedAddress tile, int pass, const SourceOf& source) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (Pattern::kThroughRegisters) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Source<T> unit = source(i, j);
          word_[pass][i][j] = unit.valid ? ptx::load_global_read_only(unit.from) : T{};
        }
      } else {
        const Source<T> unit = source(i, 0);
        ptx::cp_async<Pattern::kUnitBytes>(address(tile, pass, i), unit.from, unit.valid);
      }
    }
  }

  RF_DEVICE void land(ptx::SharedAddress tile) const {
    if constexpr (Pattern::kThroughRegisters) {
#pragma unroll
      for (int pass = 0; pass < Pattern::kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const uint32_t low = word_[pass][i][0].bits;
          const uint32_t high = word_[pass][i][1].bits;
          ptx::store_shared(address(tile, pass, i), low | high << 16);
        }
      }
    }
  }

 private:
  RF_DEVICE ptx::SharedAddress address(ptx::SharedAddress tile, int pass, int i) const {
    const uint32_t chunk =
        kWidth == LoadWidth::kWide ? 0 : static_cast<uint32_t>(pass) * kChunkBytes ^ chunk_;
    return tile + place_ + chunk + i * Pattern::kRowStep * KMajor::kRowBytes;
  }

  uint32_t chunk_;  // swizzle of this thread's rows, in bytes
  uint32_t place_;  // of the first row's unit within the tile
  T word_[Pattern::kThroughRegisters ? Pattern::kPasses : 1][Pattern::kThroughRegisters ? kRows : 1]
         [2];
};

// The operands of a forward convolution, step after step.
template <class T, class Shape, LoadWidth kWidth>
class ConvLoader {
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using Left = RowLoader<T, Shape, kWidth, Shape::kM>;
  using Right = RowLoader<T, Shape, kWidth, Shape::kN>;

 public:
  // The first step begins at `first_element` of the reduction.
  RF_DEVICE ConvLoader(const ConvOperands& operands, const Tile& tile, int32_t first_element,
                       uint32_t thread)
      : operands_(operands), left_(thread), right_(thread) {
    const ImageGather& image = operands.image;
    const auto row = static_cast<int32_t>(thread / Pattern::kLanes);
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    at_ = column_of(first_element + lane * Pattern::kUnit, operands.reduction);
    const T* group = static_cast<const T*>(operands.x) + tile.group * image.group_stride;
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const int32_t m = tile.m * Shape::kM + row + i * Pattern::kRowStep;
      const bool known = m < operands.grid.pixels;
      const Pixel pixel = pixel_of(known ? m : 0, operands.grid);
      const int32_t h = pixel.p * image.stride_h + image.origin_h;
      const int32_t w = pixel.q * image.stride_w + image.origin_w;
      h_[i] = known ? h : kNowhere;
      w_[i] = w;
      pixel_[i] =
          group + (pixel.n * image.image_stride + h * image.row_stride + w * image.pixel_stride);
    }
    const int32_t n = tile.n * Shape::kN + row;
    filters_left_ = operands.filters - n;
    filter_ = static_cast<const T*>(operands.weight) +
              (static_cast<int64_t>(tile.group) * operands.filters + n) * operands.filter_stride;
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      const Column first = at_;
      const Column second =
          Pattern::kThroughRegisters ? advanced(at_, operands_.next, operands_.reduction) : at_;
      const ImageGather& image = operands_.image;
      left_.issue(stage, pass, [&](int i, int j) {
        const Column& at = j == 0 ? first : second;
        const auto h = static_cast<uint32_t>(h_[i] + at.r * image.step_h);
        const auto w = static_cast<uint32_t>(w_[i] + at.s * image.step_w);
        const bool inside =
            h < static_cast<uint32_t>(image.height) && w < static_cast<uint32_t>(image.width);
        return Source<T>{pixel_[i] + offset(at, image.columns), inside && known(at)};
      });
      right_.issue(stage + Shape::kM * Shape::kStepBytes, pass, [&](int i, int j) {
        const Column& at = j == 0 ? first : second;
        const T* row = filter_ + i * (Pattern::kRowStep * operands_.filter_stride);
        return Source<T>{row + offset(at, operands_.filter_columns),
                         i * Pattern::kRowStep < filters_left_ && known(at)};
      });
      at_ = advanced(at_, operands_.advance, operands_.reduction);
    }
  }

  RF_DEVICE void land(ptx::SharedAddress stage) const {
    left_.land(stage);
    right_.land(stage + Shape::kM * Shape::kStepBytes);
  }

  RF_DEVICE void arrived(ptx::SharedAddress) const {}

 private:
  static constexpr int32_t kNowhere = INT32_MIN / 2;  // no tap leads from there into an image

  RF_DEVICE bool known(const Column& at) const { return at.r < operands_.reduction.taps_r; }
  static RF_DEVICE int64_t offset(const Column& at, const ColumnStrides& strides) {
    const int64_t channel = kWidth == LoadWidth::kWide ? at.c : at.c * strides.c;
    return channel + at.s * strides.s + at.r * strides.r;
  }

  const ConvOperands& operands_;
  Left left_;
  Right right_;
  Column at_;
  const T* pixel_[Left::kRows];  // first tap, first channel of the group; may lie outside
  int32_t h_[Left::kRows];       // row and column of the first tap
  int32_t w_[Left::kRows];
  const T* filter_;
  int32_t filters_left_;  // rows that exist from this thread's first one on
};

}  // namespace resnet_fused
