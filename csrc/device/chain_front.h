// The 3x3 convolution in front of a chain: stride 1, padding 1. Its sums stay in registers, its
// result in shared memory, where the chain finds the rows that it would load without.
//
// Pixels in the order of memory: a tap moves all of a tile's pixels by the same distance, so that
// the tile with as many pixels before and behind as a tap reaches, the window, holds all nine. It
// is loaded once. A tap's rows are read where they lie; where a tap leaves the image, from zeros.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_act.h"
#include "chain_epilogue.h"
#include "chain_geometry.h"
#include "chain_loader.h"
#include "main_loop.h"

namespace resnet_fused {

// The window and the filters of the steps of the front: three taps by 32 channels each.
template <class Shape>
class FrontLoader {
 public:
  RF_DEVICE FrontLoader(const ConvChainArguments& arguments, int32_t tile,
                        ptx::SharedAddress shared, uint32_t thread)
      : arguments_(arguments),
        first_(tile * Shape::kM - static_cast<int32_t>(arguments.grid.columns.value) - 1),
        shared_(shared),
        thread_(thread) {}

  // Once: zeros, scale, shift and the first channels of the window.
  RF_DEVICE void begin() const {
    if (thread_ < kZeroBytes / 4) ptx::store_shared(zeros() + thread_ * 4, uint32_t{0});
#pragma unroll
    for (uint32_t i = thread_; i < 2 * Shape::kFront; i += Shape::kThreads) {
      const ChainFilters& front = arguments_.front;
      const auto channel = static_cast<int32_t>(i % Shape::kFront);
      const float* vector = i < Shape::kFront ? front.scale : front.shift;
      ptx::cp_async<4>(vectors() + i * 4, vector + channel, channel < front.filters);
    }
    copy_window(0);
  }

  // The filters of a step; kAhead: how many steps lie between this call and its use.
  template <int kAhead>
  RF_DEVICE void issue(int step, ptx::SharedAddress to) const {
    static_assert(kAhead <= kFrontTaps, "the window's next channels would come too late");
    const ChainFilters& front = arguments_.front;
    const int slab = step / kFrontTaps;
    const int r = step - slab * kFrontTaps;
#pragma unroll
    for (int s = 0; s < kFrontTaps; ++s) {
      copy_filters<Shape, Shape::kFront>(to + s * kSlabBytes<Shape::kFront>, front, 0,
                                         slab * kLoadLanes, 1, thread_,
                                         r * front.row + s * front.column);
    }
    // The first row of taps of a slab is in use: nobody reads the slab before it any more.
    const int used = step - kAhead;
    if (used >= 0 && used % kFrontTaps == 0 && used / kFrontTaps + 1 < arguments_.front_slabs) {
      copy_window(used / kFrontTaps + 1);
    }
  }

  RF_DEVICE ptx::SharedAddress window_at(int slab) const {
    return shared_ + slab % 2 * arguments_.memory.window;
  }
  RF_DEVICE ptx::SharedAddress zeros() const { return shared_ + arguments_.memory.zeros_at; }
  RF_DEVICE ptx::SharedAddress vectors() const { return zeros() + kZeroBytes; }

 private:
  RF_DEVICE void copy_window(int slab) const {
    const ChainImage& image = arguments_.x;
    const PixelGrid& grid = arguments_.grid;
    const ptx::SharedAddress to = window_at(slab);
    const auto rows = Shape::kM + 2 * (grid.columns.value + 1);
    const uint32_t lane = thread_ % kLoadLanes;
    const int32_t unit = slab * kLoadLanes + static_cast<int32_t>(lane);
#pragma unroll 1
    for (uint32_t row = thread_ / kLoadLanes; row < rows; row += Shape::kThreads / kLoadLanes) {
      const int32_t pixel = first_ + static_cast<int32_t>(row);
      const bool known = pixel >= 0 && pixel < grid.pixels;
      const int32_t from = offset_of(pixel_of(known ? pixel : 0, grid), image.strides);
      ptx::cp_async<kChunkBytes>(to + KMajor::offset(row, lane), wide_at(image.data, from + unit),
                                 known && unit < image.units);
    }
  }

  const ConvChainArguments& arguments_;
  int32_t first_;  // pixel of the window
  ptx::SharedAddress shared_;
  uint32_t thread_;
};

// Where a tap's rows lie in shared memory: one row for each 16 of the warp's, by lane, as
// ldmatrix takes them.
template <class Shape>
struct TapFragments {
  ptx::SharedAddress row[Shape::kBlocksM];

  RF_DEVICE void load(uint32_t (&fragments)[Shape::kBlocksM][4], ptx::SharedAddress,
                      int slice) const {
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      ptx::ldmatrix_x4(fragments[i], row[i] ^ (static_cast<uint32_t>(slice) * kSliceBytes));
    }
  }
};

template <class T, class Shape>
class ChainFront {
  using Sums = resnet_fused::Sums<typename Shape::Front>;
  using Right = KMajorFragments<Side::kRight, Shape::Front::kBlocksN>;

 public:
  RF_DEVICE ChainFront(const ConvChainArguments& arguments, int32_t tile, const Place<Shape>& place)
      : arguments_(arguments), pairs_(place), right_(0, place.lane), lane_(place.lane) {
    const PixelGrid& grid = arguments.grid;
    const auto width = static_cast<int32_t>(grid.columns.value);
    const auto height = static_cast<int32_t>(grid.rows.value);
    // As KMajorFragments on the left: rows 0-7 and 8-15, then both of the next 16 bytes.
    const uint32_t matrix = place.lane / 8;
    row_ = place.row + matrix % 2 * 8 + place.lane % 8;
    chunk_ = matrix / 2;
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      const int32_t pixel = tile * Shape::kM + static_cast<int32_t>(row_) + i * 16;
      const bool known = pixel < grid.pixels;
      const Pixel at = pixel_of(known ? pixel : 0, grid);
      const uint32_t columns = (at.q > 0) | 2u | (at.q + 1 < width) << 2;
      taps_[i] = (at.p > 0 ? columns : 0) | columns << 3 | (at.p + 1 < height ? columns << 6 : 0);
      if (!known) taps_[i] = 0;
      ptx::keep(taps_[i]);
    }
  }

  // Adds a row of taps of 32 channels.
  RF_DEVICE void multiply(Sums& sums, const FrontLoader<Shape>& loader, int step,
                          ptx::SharedAddress filters) const {
    const int slab = step / kFrontTaps;
    const int r = step - slab * kFrontTaps;
    const ptx::SharedAddress window = loader.window_at(slab);
    const uint32_t row = row_ + static_cast<uint32_t>(r) * arguments_.grid.columns.value;
    Fragments<typename Shape::Front> fragments;
    TapFragments<Shape> left;
    const auto load_first = [&](int s) {
      left = tap(window, loader.zeros(), row, r, s);
      left.load(fragments.left[0], window, 0);
      right_.load_block(fragments.right[0], filters + s * kSlabBytes<Shape::kFront>, 0, 0);
    };
    load_first(0);
#pragma unroll
    for (int s = 0; s < kFrontTaps; ++s) {
      multiply_step<T>(sums, fragments, left, right_, window,
                       filters + s * kSlabBytes<Shape::kFront>, [&] {
                         if (s + 1 < kFrontTaps) load_first(s + 1);
                       });
    }
  }

  // The warp's rows of what the first 1x1 convolution reads, from `rows` on, where the window was.
  RF_DEVICE void put(const Sums& sums, ptx::SharedAddress rows, ptx::SharedAddress vectors) const {
    const BnAct<float> op{0.0f};
    constexpr int kColumns = kChainStep / 8;  // of 8 in a slab
#pragma unroll
    for (int j = 0; j < Shape::kFront / 8; ++j) {
      if (j / kColumns >= arguments_.x_slabs) return;
      const ptx::SharedAddress at = vectors + (j * 8 + lane_ % 4 * 2) * 4;
      const auto scale = ptx::load_shared<FloatPair>(at);
      const auto shift = ptx::load_shared<FloatPair>(at + Shape::kFront * 4);
      // Where no channel is, an infinite pixel may have made a NaN of a filter that is not there.
      const bool known = j * 8 < arguments_.front.filters;
      const ptx::SharedAddress slab = rows + j / kColumns * kSlabBytes<Shape::kM>;
#pragma unroll
      for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
        const auto& value = sums.value[i / 2][j];
        const float first = op(value[i % 2 * 2], scale.first, shift.first);
        const float second = op(value[i % 2 * 2 + 1], scale.second, shift.second);
        Pair<T> result;
        result.first = narrow<T>(known ? first : 0.0f);
        result.second = narrow<T>(known ? second : 0.0f);
        ptx::store_shared(slab + pairs_.at(i, j % kColumns), result);
      }
    }
  }

 private:
  // `row`: of the window, the first of the row of taps r.
  RF_DEVICE TapFragments<Shape> tap(ptx::SharedAddress window, ptx::SharedAddress zeros,
                                    uint32_t row, int r, int s) const {
    TapFragments<Shape> made;
    // Sixteen rows further the swizzle is the same.
    const uint32_t place = KMajor::offset(row + static_cast<uint32_t>(s), chunk_);
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      const bool inside = (taps_[i] >> (r * kFrontTaps + s) & 1) != 0;
      made.row[i] = inside ? window + place + i * kSlabBytes<16> : zeros + place % kZeroBytes;
    }
    return made;
  }

  const ConvChainArguments& arguments_;
  PairPlaces<T, Shape> pairs_;
  Right right_;
  uint32_t lane_;
  uint32_t row_;                    // of the tile, that the lane names to ldmatrix
  uint32_t chunk_;                  // likewise which 16 bytes of it
  uint32_t taps_[Shape::kBlocksM];  // a bit for each tap of the row that lies in the image
};

}  // namespace resnet_fused
