// The loader of conv_wgrad: output pixels are the reduction, both operands lie along channels, and
// dy's part is masked in shared memory.
#pragma once

#include <cstdint>

#include "gradient_geometry.h"
#include "gradient_mask.h"
#include "mn_major_loader.h"

namespace resnet_fused {

// The left tile: [pixels][output channels], and y's, as dy's.
template <class T, class Shape, LoadWidth kWidth>
class WgradRows {
 protected:
  using Left = MnMajorLoader<T, Shape, kWidth, Shape::kM>;
  using Offset = StrideOffset<kWidth>;
  static constexpr int kColumns = Left::kThroughRegisters ? 2 : 1;  // that a thread looks up

  // The first step begins at output pixel `first_pixel`.
  RF_DEVICE WgradRows(const ConvWgradArguments& arguments, const Tile& tile, int32_t first_pixel,
                      uint32_t thread)
      : arguments_(arguments), dy_(thread), y_(thread) {
    dz_at_ = column_of(first_pixel + dy_.row(), arguments.pixels);
    dz_advance_ = column_of(Left::kRowStep, arguments.pixels);
    const int32_t m = tile.m * Shape::kM + dy_.column();
    const int32_t k = tile.group * arguments.channels_out + m;
    channels_left_ = arguments.channels_out - m;
    dy_channel_ = static_cast<const T*>(arguments.dy) + k * arguments.dy_k;
    y_channel_ = static_cast<const T*>(arguments.y) + k * arguments.y_k;
  }

  // This thread's row i of a step; the next one follows.
  RF_DEVICE void issue_row(ptx::SharedAddress stage, int i) {
    issue_channels(dy_, stage, i, dy_channel_, arguments_.dy_pixels, arguments_.dy_k);
    if (arguments_.y != nullptr) {
      issue_channels(y_, stage + Shape::kMaskOffset, i, y_channel_, arguments_.y_pixels,
                     arguments_.y_k);
    }
    dz_at_ = advanced(dz_at_, dz_advance_, arguments_.pixels);
  }
  RF_DEVICE void land_rows(ptx::SharedAddress stage) const {
    dy_.land(stage);
    if (arguments_.y != nullptr) y_.land(stage + Shape::kMaskOffset);
  }

  const ConvWgradArguments& arguments_;
  Left dy_;
  Left y_;
  int32_t channels_left_;  // output channels from this thread's on
  Column dz_at_;           // output pixel (q, p, n) of dy's row that is asked for next

 private:
  RF_DEVICE void issue_channels(Left& loader, ptx::SharedAddress tile, int i, const T* channel,
                                const ColumnStrides& pixels, int64_t next_channel) {
    const T* pixel = moved_by<T, kWidth>(channel, along<Offset>(dz_at_, pixels));
    const bool known = dz_at_.r < arguments_.pixels.taps_r;
    loader.issue(tile, i, [&](int j) {
      return Source<T>{kWidth == LoadWidth::kWide ? pixel : pixel + j * next_channel,
                       known && j < channels_left_};
    });
  }

  Column dz_advance_;
  const T* dy_channel_;  // of pixel 0
  const T* y_channel_;
};

// Beside it the right tile: [pixels][taps and input channels].
template <class T, class Shape, LoadWidth kWidth>
class WgradLoader : public WgradRows<T, Shape, kWidth> {
  using Rows = WgradRows<T, Shape, kWidth>;

 protected:
  using typename Rows::Left;
  using typename Rows::Offset;
  using Right = MnMajorLoader<T, Shape, kWidth, Shape::kN>;
  using Rows::kColumns;

 public:
  RF_DEVICE WgradLoader(const ConvWgradArguments& arguments, const Tile& tile, int32_t first_pixel,
                        uint32_t thread)
      : Rows(arguments, tile, first_pixel, thread), x_(thread) {
    x_at_ = column_of(first_pixel + x_.row(), arguments.pixels);
    x_advance_ = column_of(Right::kRowStep, arguments.pixels);

    const int32_t n = tile.n * Shape::kN + x_.column();
    columns_left_ = arguments.columns_each - n;
    const int32_t group = tile.group * arguments.columns.channels;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Column column = column_of(n + j, arguments.columns);
      h_[j] = column.r * arguments.dilation_h - arguments.padding_h;
      w_[j] = column.s * arguments.dilation_w - arguments.padding_w;
      x_column_[j] = static_cast<const T*>(arguments.x) + (group + column.c) * arguments.x_taps.c +
                     h_[j] * arguments.x_taps.r + w_[j] * arguments.x_taps.s;
    }
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      if constexpr (kSameRows) issue_columns(right_of(stage), i, this->dz_at_);
      this->issue_row(stage, i);
    }
    if constexpr (!kSameRows) {
#pragma unroll
      for (int i = 0; i < Right::kRows; ++i) {
        issue_columns(right_of(stage), i, x_at_);
        x_at_ = advanced(x_at_, x_advance_, this->arguments_.pixels);
      }
    }
  }

  RF_DEVICE void land(ptx::SharedAddress stage) const {
    this->land_rows(stage);
    x_.land(right_of(stage));
  }

  // dz in place of this thread's part of dy.
  RF_DEVICE void arrived(ptx::SharedAddress stage) const {
    if (this->arguments_.y == nullptr) return;
    using LeftUnit = Unit<T, Left::kUnit>;
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const ptx::SharedAddress at = this->dy_.address(stage, i);
      auto unit = ptx::load_shared<LeftUnit>(at);
      mask(unit, ptx::load_shared<LeftUnit>(this->y_.address(stage + Shape::kMaskOffset, i)));
      ptx::store_shared(at, unit);
    }
  }

 protected:
  static RF_DEVICE ptx::SharedAddress right_of(ptx::SharedAddress stage) {
    return stage + Shape::kM * Shape::kStepBytes;
  }

  // Whether column j of this thread's has a pixel of the image at an output pixel: zeros elsewhere.
  RF_DEVICE bool has_pixel(int j, const Column& at) const {
    const ConvWgradArguments& arguments = this->arguments_;
    const int32_t h = at.s * arguments.stride_h + h_[j];
    const int32_t w = at.c * arguments.stride_w + w_[j];
    return at.r < arguments.pixels.taps_r &&
           static_cast<uint32_t>(h) < static_cast<uint32_t>(arguments.height) &&
           static_cast<uint32_t>(w) < static_cast<uint32_t>(arguments.width) && j < columns_left_;
  }

  Right x_;
  Column x_advance_;      // from one of x's rows to the next
  int32_t columns_left_;  // columns from this thread's on

 private:
  // Whether a thread's rows of both tiles are the same pixels, which it then counts once.
  static constexpr bool kSameRows = Left::kRowStep == Right::kRowStep;

  RF_DEVICE void issue_columns(ptx::SharedAddress tile, int i, const Column& at) {
    const auto pixel = along<Offset>(at, this->arguments_.x_pixels);
    x_.issue(tile, i, [&](int j) {
      return Source<T>{moved_by<T, kWidth>(x_column_[j], pixel), has_pixel(j, at)};
    });
  }

  Column x_at_;  // output pixel (q, p, n) of x's row that is asked for next; unused with kSameRows
  const T* x_column_[kColumns];  // tap and channel, for pixel 0; may lie outside
  int32_t h_[kColumns];          // row and column of the tap, for pixel 0
  int32_t w_[kColumns];
};

}  // namespace resnet_fused
