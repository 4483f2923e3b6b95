// Loaders: an operand's rows, from global memory into the K-major tiles of a step.
//
// A thread brings the same 4 bytes x 4 columns or 16 bytes of a row in every step, and rows that
// lie kRowStep apart. Rows beyond the tensor, taps outside of the image and columns behind the end
// of the reduction become zeros, without being read.
#pragma once

#include <cstdint>
#include <type_traits>

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
    ptx::keep(place_);
  }

  // source(i, j): element j of the unit that row i of this thread has in this pass; j is 0 but
  // where two elements make a unit. kReadOnly: nobody writes there while the kernel runs, which a
  // kernel ahead that has not ended may do.
  template <bool kReadOnly = true, class SourceOf>
  RF_DEVICE void issue(ptx::SharedAddress tile, int pass,
                       const SourceOf& source RF_SITE_PARAMETER) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (Pattern::kThroughRegisters) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Source<T> unit = source(i, j);
          if (!unit.valid) {
            word_[pass][i][j] = T{};
          } else if constexpr (kReadOnly) {
            word_[pass][i][j] = ptx::load_global_read_only(unit.from RF_SITE);
          } else {
            word_[pass][i][j] = ptx::load_global(unit.from RF_SITE);
          }
        }
      } else {
        const Source<T> unit = source(i, 0);
        ptx::cp_async<Pattern::kUnitBytes>(address(tile, pass, i), unit.from, unit.valid RF_SITE);
      }
    }
  }

  RF_DEVICE void land(ptx::SharedAddress tile RF_SITE_PARAMETER) const {
    if constexpr (Pattern::kThroughRegisters) {
#pragma unroll
      for (int pass = 0; pass < Pattern::kPasses; ++pass) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const uint32_t low = word_[pass][i][0].bits;
          const uint32_t high = word_[pass][i][1].bits;
          ptx::store_shared(address(tile, pass, i), low | high << 16 RF_SITE);
        }
      }
    }
  }

  // Where this thread's unit of its row i lies.
  RF_DEVICE ptx::SharedAddress address(ptx::SharedAddress tile, int pass, int i) const {
    const uint32_t chunk =
        kWidth == LoadWidth::kWide ? 0 : static_cast<uint32_t>(pass) * kChunkBytes ^ chunk_;
    return tile + place_ + chunk + i * Pattern::kRowStep * KMajor::kRowBytes;
  }

 private:
  uint32_t chunk_;  // swizzle of this thread's rows, in bytes
  uint32_t place_;  // of the first row's unit within the tile
  T word_[Pattern::kThroughRegisters ? Pattern::kPasses : 1][Pattern::kThroughRegisters ? kRows : 1]
         [2];
};

// The operands of a forward convolution, step after step.
//
// What a thread keeps for each of its pixels is small, because the sums leave few registers, and
// the compiler would rather work it out anew in every step: an offset and the taps that lie inside
// of the image, a bit for each row of taps and one for each column.
template <class T, class Shape, LoadWidth kWidth>
class ConvLoader {
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using Left = RowLoader<T, Shape, kWidth, Shape::kM>;
  using Right = RowLoader<T, Shape, kWidth, Shape::kN>;
  // Strides count units: of 16 bytes, which 31 bits are enough for, or elements.
  using Offset = std::conditional_t<kWidth == LoadWidth::kWide, int32_t, int64_t>;
  static constexpr int kStrideBytes =
      kWidth == LoadWidth::kWide ? kChunkBytes : static_cast<int>(sizeof(T));

 public:
  // The first step begins at `first_element` of the reduction.
  RF_DEVICE ConvLoader(const ConvOperands& operands, const Tile& tile, int32_t first_element,
                       uint32_t thread)
      : operands_(operands), left_(thread), right_(thread) {
    const ImageGather& image = operands.image;
    const auto row = static_cast<int32_t>(thread / Pattern::kLanes);
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    at_ = column_of(first_element + lane * Pattern::kUnit, operands.reduction);
    image_ = reinterpret_cast<const unsigned char*>(static_cast<const T*>(operands.x) +
                                                    tile.group * image.group_stride);
    ptx::keep(image_);
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const int32_t m = tile.m * Shape::kM + row + i * Pattern::kRowStep;
      const bool known = m < operands.grid.pixels;
      const Pixel pixel = pixel_of(known ? m : 0, operands.grid);
      const int32_t h = pixel.p * image.stride_h + image.origin_h;
      const int32_t w = pixel.q * image.stride_w + image.origin_w;
      pixel_[i] = static_cast<Offset>(pixel.n * image.image_stride + h * image.row_stride +
                                      w * image.pixel_stride);
      taps_[i] = known ? taps_inside(h, image.step_h, image.height, operands.reduction.taps_r) |
                             taps_inside(w, image.step_w, image.width, operands.reduction.taps_s)
                                 << kColumnBits
                       : 0;
      ptx::keep(pixel_[i]);
      ptx::keep(taps_[i]);
    }
    const int32_t n = tile.n * Shape::kN + row;
    filters_left_ = operands.filters - n;
    filter_ = static_cast<Offset>((static_cast<int64_t>(tile.group) * operands.filters + n) *
                                  operands.filter_stride);
  }

  // The filters of the first `steps` steps, which lie one behind the other in the ring. They are
  // constants, and may come before the kernel ahead has ended; `first` brings the rest.
  RF_DEVICE void issue_filters(ptx::SharedAddress ring, int steps) {
    Column at = at_;
    for (int i = 0; i < steps; ++i) {
      const ptx::SharedAddress tile = right_of(ring + i * Shape::kStageBytes);
#pragma unroll
      for (int pass = 0; pass < Pattern::kPasses; ++pass) {
        filters(tile, pass, wanted(at), behind(at));
        at = advanced(at, operands_.advance, operands_.reduction);
      }
      right_.land(tile);
    }
  }

  // A step whose filters have been asked for.
  RF_DEVICE void first(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      pixels(stage, pass, wanted(at_), behind(at_));
      at_ = advanced(at_, operands_.advance, operands_.reduction);
    }
    left_.land(stage);
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      const Wanted one = wanted(at_);
      const Wanted two = behind(at_);
      pixels(stage, pass, one, two);
      filters(right_of(stage), pass, one, two);
      at_ = advanced(at_, operands_.advance, operands_.reduction);
    }
  }

  RF_DEVICE void land(ptx::SharedAddress stage) const {
    left_.land(stage);
    right_.land(right_of(stage));
  }

  RF_DEVICE void arrived(ptx::SharedAddress) const {}

 protected:
  // Where this thread's unit of a pass that has landed lies, of its row i.
  RF_DEVICE ptx::SharedAddress pixel_at(ptx::SharedAddress stage, int pass, int i) const {
    return left_.address(stage, pass, i);
  }
  // Whether it was read, of pixels that exist inside of the image; zeros otherwise.
  RF_DEVICE bool was_read(int i, const Column& at) const {
    if (at.r >= operands_.reduction.taps_r) return false;
    const uint32_t tap = 1u << at.r | 1u << (at.s + kColumnBits);
    return (taps_[i] & tap) == tap;
  }

 private:
  static constexpr int kColumnBits = 16;  // rows of taps have the bits 0-14, columns 16-30
  static_assert(kMostTaps < kColumnBits);
  static constexpr uint32_t kNoTap = 0xFFFFFFFFu;  // more than any pixel has

  // Which of `taps` positions first, first + step, .. lie in [0, size): a bit for each.
  static RF_DEVICE uint32_t taps_inside(int32_t first, int32_t step, int32_t size, int32_t taps) {
    uint32_t inside = 0;
#pragma unroll 1
    for (int32_t tap = 0; tap < taps; ++tap) {
      const auto at = static_cast<uint32_t>(first + tap * step);
      inside |= static_cast<uint32_t>(at < static_cast<uint32_t>(size)) << tap;
    }
    return inside;
  }

  // What a column of the reduction means for every row: offsets, and the bits of its tap.
  struct Wanted {
    Offset pixel;
    Offset filter;
    uint32_t taps;
  };
  RF_DEVICE Wanted wanted(const Column& at) const {
    const bool known = at.r < operands_.reduction.taps_r;
    return Wanted{offset(at, operands_.image.columns), offset(at, operands_.filter_columns),
                  known ? 1u << at.r | 1u << (at.s + kColumnBits) : kNoTap};
  }
  // The same of the column behind, for units of two elements.
  RF_DEVICE Wanted behind(const Column& at) const {
    return wanted(Pattern::kThroughRegisters ? advanced(at, operands_.next, operands_.reduction)
                                             : at);
  }

  static RF_DEVICE ptx::SharedAddress right_of(ptx::SharedAddress stage) {
    return stage + Shape::kM * Shape::kStepBytes;
  }

  RF_DEVICE void pixels(ptx::SharedAddress tile, int pass, const Wanted& one, const Wanted& two) {
    left_.template issue<false>(tile, pass, [&](int i, int j) {
      const Wanted& at = j == 0 ? one : two;
      return Source<T>{moved(image_, pixel_[i] + at.pixel), (taps_[i] & at.taps) == at.taps};
    });
  }

  RF_DEVICE void filters(ptx::SharedAddress tile, int pass, const Wanted& one, const Wanted& two) {
    const auto* weight = static_cast<const unsigned char*>(operands_.weight);
    right_.issue(tile, pass, [&](int i, int j) {
      const Wanted& at = j == 0 ? one : two;
      const auto row =
          static_cast<Offset>(i * Pattern::kRowStep * static_cast<Offset>(operands_.filter_stride));
      return Source<T>{moved(weight, filter_ + row + at.filter),
                       i * Pattern::kRowStep < filters_left_ && at.taps != kNoTap};
    });
  }

  static RF_DEVICE const T* moved(const unsigned char* base, Offset offset) {
    return reinterpret_cast<const T*>(base + int64_t{offset} * kStrideBytes);
  }
  static RF_DEVICE Offset offset(const Column& at, const ColumnStrides& strides) {
    const Offset channel =
        kWidth == LoadWidth::kWide ? at.c / Pattern::kUnit : at.c * static_cast<Offset>(strides.c);
    return channel + at.s * static_cast<Offset>(strides.s) + at.r * static_cast<Offset>(strides.r);
  }

  const ConvOperands& operands_;
  Left left_;
  Right right_;
  Column at_;
  const unsigned char* image_;  // the group's first channel of pixel (0, 0, 0)
  Offset pixel_[Left::kRows];   // from there to the first tap, which may lie outside
  uint32_t taps_[Left::kRows];  // those inside of the image
  Offset filter_;
  int32_t filters_left_;  // rows that exist from this thread's first one on
};

}  // namespace resnet_fused
