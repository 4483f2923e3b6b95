// The loader of conv_bn_wgrad: conv_wgrad's, whose operands are both read through a BatchNorm.
//
// Both are turned in their place in shared memory by the thread that has copied them, between its
// copies' landing and the barrier that the step waits at in any case. On fragments, dy's would be
// turned by every warp along N and x's by every one along M: twice in most tiles, and y's would
// come from shared memory as often.
#pragma once

#include <cstdint>

#include "bn_backward_operand.h"
#include "normed_operand.h"
#include "vector.h"
#include "wgrad_loader.h"

namespace resnet_fused {

// A loader's left side, read through the BatchNorm's backward. Base: a WgradRows.
template <class T, class Shape, LoadWidth kWidth, class Base>
class AffineRows : public Base {
 protected:
  using typename Base::Left;

  // Rows of coefficients lie at multiples of 16 bytes where channels are read wide.
  RF_DEVICE AffineRows(const ConvBnWgradArguments& arguments, const Tile& tile, int32_t first_pixel,
                       uint32_t thread)
      : Base(arguments.product, tile, first_pixel, thread),
        whole_(arguments),
        dz_pixel_(first_pixel + this->dy_.row()) {
    const int32_t m = tile.m * Shape::kM + this->dy_.column();
#pragma unroll
    for (int j = 0; j < Base::kColumns; ++j) {
      // What lies beyond the last one reads another one's: nobody stores what comes of it.
      filter_[j] =
          tile.group * arguments.product.channels_out + (j < this->channels_left_ ? m + j : m);
    }
  }

  // dy in place of this thread's part of dz: zeros behind the last pixel, and not c.
  RF_DEVICE void turn_gradient(ptx::SharedAddress stage) {
    if (whole_.coefficients == nullptr || this->channels_left_ <= 0) return;
    using LeftUnit = Unit<T, Left::kUnit>;
    const Reduction& pixels = whole_.product.pixels;
    const int32_t end = pixels.channels * pixels.taps_s * pixels.taps_r;
    BackwardRows<Left::kUnit> rows;
    load(rows.a, whole_.coefficients, filter_);
    load(rows.b, whole_.coefficients + whole_.filters, filter_);
    load(rows.c, whole_.coefficients + int64_t{2} * whole_.filters, filter_);
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const ptx::SharedAddress at = this->dy_.address(stage, i);
      auto unit = ptx::load_shared<LeftUnit>(at);
      const auto y = ptx::load_shared<LeftUnit>(this->y_.address(stage + Shape::kMaskOffset, i));
      apply_backward(unit, y, rows);
      if (dz_pixel_ >= end) unit = LeftUnit{};
      ptx::store_shared(at, unit);
      dz_pixel_ += Left::kRowStep;
    }
  }

  // Of the channels of a unit: side by side, or those of each of its elements.
  template <int kUnit>
  static RF_DEVICE void load(float (&values)[kUnit], const float* from,
                             const int32_t (&channels)[Base::kColumns]) {
    if constexpr (kWidth == LoadWidth::kWide) {
      load_channels(values, from + channels[0]);
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        values[j] = ptx::load_global_read_only(from + channels[j]);
      }
    }
  }

  const ConvBnWgradArguments& whole_;

 private:
  int32_t dz_pixel_;  // of dz's row that is turned next
  int32_t filter_[Base::kColumns];
};

template <class T, class Shape, LoadWidth kWidth>
class BnWgradLoader : public AffineRows<T, Shape, kWidth, WgradLoader<T, Shape, kWidth>> {
  using Base = AffineRows<T, Shape, kWidth, WgradLoader<T, Shape, kWidth>>;
  using typename Base::Right;

 public:
  RF_DEVICE BnWgradLoader(const ConvBnWgradArguments& arguments, const Tile& tile,
                          int32_t first_pixel, uint32_t thread)
      : Base(arguments, tile, first_pixel, thread),
        x_at_(column_of(first_pixel + this->x_.row(), arguments.product.pixels)) {
    const ConvWgradArguments& product = arguments.product;
    const int32_t n = tile.n * Shape::kN + this->x_.column();
#pragma unroll
    for (int j = 0; j < Base::kColumns; ++j) {
      const int32_t column = j < this->columns_left_ ? n + j : n;
      channel_[j] = tile.group * product.columns.channels + column_of(column, product.columns).c;
    }
  }

  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    this->turn_gradient(stage);
    if (this->whole_.norm != nullptr && this->columns_left_ > 0) turn_input(this->right_of(stage));
  }

 private:
  // h in place of this thread's part of x: zeros beside the image, where padding is behind the
  // ReLU.
  RF_DEVICE void turn_input(ptx::SharedAddress tile) {
    using RightUnit = Unit<T, Right::kUnit>;
    const ConvBnWgradArguments& arguments = this->whole_;
    float scale[Right::kUnit];
    float shift[Right::kUnit];
    Base::load(scale, arguments.norm, channel_);
    Base::load(shift, arguments.norm + arguments.channels, channel_);
#pragma unroll
    for (int i = 0; i < Right::kRows; ++i) {
      const ptx::SharedAddress at = this->x_.address(tile, i);
      auto unit = ptx::load_shared<RightUnit>(at);
      normalise(unit, scale, shift);
      if constexpr (Base::kColumns > 1) {  // the second one may be another tap's
#pragma unroll
        for (int j = 0; j < Base::kColumns; ++j) {
          if (!this->has_pixel(j, x_at_)) unit.value[j] = T{};
        }
      } else {
        if (!this->has_pixel(0, x_at_)) unit = RightUnit{};
      }
      ptx::store_shared(at, unit);
      x_at_ = advanced(x_at_, this->x_advance_, arguments.product.pixels);
    }
  }

  Column x_at_;  // output pixel of x's row that is turned next
  int32_t channel_[Base::kColumns];
};

}  // namespace resnet_fused
