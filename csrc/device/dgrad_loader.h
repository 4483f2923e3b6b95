// The loader of conv_dgrad: gathers dy and y of a phase's taps, brings the filters, and turns dy
// into scale * dz in shared memory.
#pragma once

#include <cstdint>

#include "conv_loader.h"
#include "gradient_geometry.h"
#include "gradient_mask.h"
#include "mn_major_loader.h"
#include "vector.h"

namespace resnet_fused {

// Where a block of conv_dgrad works.
struct DgradPlace {
  int32_t m;  // first pixel of the phase
  int32_t n;  // first input channel, counted within the group
  int32_t group;
  Phase h;
  Phase w;

  template <class Shape>
  static RF_DEVICE DgradPlace of(const Tile& tile, const ConvDgradArguments& arguments) {
    const int32_t phase = tile.m % arguments.phases;
    return DgradPlace{tile.m / arguments.phases * Shape::kM, tile.n * Shape::kN, tile.group,
                      phase_of(phase / arguments.w.stride, arguments.h),
                      phase_of(phase % arguments.w.stride, arguments.w)};
  }
};

// Left tile: [pixels][output channels of a tap], K-major; right one: [output channels of a
// tap][input channels], MN-major; behind them y's, as dy's.
template <class T, class Shape, LoadWidth kWidth>
class DgradLoader {
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using Left = RowLoader<T, Shape, kWidth, Shape::kM>;
  using Right = MnMajorLoader<T, Shape, kWidth, Shape::kN>;
  using LeftUnit = Unit<T, Pattern::kUnit>;

 public:
  // The first step begins at `first_element` of the phase's reduction, which is not empty.
  RF_DEVICE DgradLoader(const ConvDgradArguments& arguments, const DgradPlace& place,
                        int32_t first_element, uint32_t thread)
      : arguments_(arguments),
        reduction_{arguments.channels_out, place.w.taps, place.h.taps},
        dy_(thread),
        y_(thread),
        filters_(thread) {
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    at_ = column_of(first_element + lane * Pattern::kUnit, reduction_);
    landed_ = at_.c;
    advance_ = column_of(Pattern::kAdvance, reduction_);
    group_ = place.group * arguments.channels_out;
    start_gather(place, static_cast<int32_t>(thread / Pattern::kLanes));
    row_ = column_of(first_element + filters_.row(), reduction_);
    row_advance_ = column_of(Right::kRowStep, reduction_);
    const int32_t n = place.n + filters_.column();
    channels_left_ = arguments.channels_in - n;
    const ColumnStrides& strides = arguments.filters;
    weight_ = static_cast<const T*>(arguments.weight) + group_ * strides.c +
              place.h.first_tap * strides.r + place.w.first_tap * strides.s +
              n * arguments.weight_c;
    filter_columns_ = {strides.c, strides.s * arguments.w.tap_step,
                       strides.r * arguments.h.tap_step};
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      const Column second =
          Pattern::kThroughRegisters ? advanced(at_, Column{1, 0, 0}, reduction_) : at_;
      gather(dy_, stage, pass, second, dy_pixel_, arguments_.dy_strides);
      if (arguments_.y != nullptr) {
        gather(y_, stage + Shape::kMaskOffset, pass, second, y_pixel_, arguments_.y_strides);
      }
      at_ = advanced(at_, advance_, reduction_);
    }
#pragma unroll
    for (int i = 0; i < Right::kRows; ++i) {
      const bool known = row_.r < reduction_.taps_r;
      filters_.issue(right_of(stage), i, [&](int j) {
        const int64_t channel = kWidth == LoadWidth::kWide ? 0 : j * arguments_.weight_c;
        return Source<T>{weight_ + offset_of(row_, filter_columns_) + channel,
                         known && j < channels_left_};
      });
      row_ = advanced(row_, row_advance_, reduction_);
    }
  }

  RF_DEVICE void land(ptx::SharedAddress stage) const {
    dy_.land(stage);
    if (arguments_.y != nullptr) y_.land(stage + Shape::kMaskOffset);
    filters_.land(right_of(stage));
  }

  // scale * dz in place of this thread's part of dy.
  RF_DEVICE void arrived(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      float scale[Pattern::kUnit];
      load_scale(scale);
#pragma unroll
      for (int i = 0; i < Left::kRows; ++i) {
        const ptx::SharedAddress at = dy_.address(stage, pass, i);
        auto unit = ptx::load_shared<LeftUnit>(at);
        multiply(unit, scale);
        if (arguments_.y != nullptr) {
          mask(unit, ptx::load_shared<LeftUnit>(y_.address(stage + Shape::kMaskOffset, pass, i)));
        }
        ptx::store_shared(at, unit);
      }
      landed_ = wrapped(landed_ + advance_.c);
    }
  }

 private:
  static constexpr int32_t kNowhere = INT32_MIN / 2;  // no tap leads from there into an image

  static RF_DEVICE ptx::SharedAddress right_of(ptx::SharedAddress stage) {
    return stage + Shape::kM * Shape::kStepBytes;
  }
  RF_DEVICE int32_t wrapped(int32_t c) const {
    return c >= reduction_.channels ? c - reduction_.channels : c;
  }

  RF_DEVICE void start_gather(const DgradPlace& place, int32_t row) {
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const int32_t m = place.m + row + i * Pattern::kRowStep;
      const bool known = m < arguments_.grid.pixels;
      Pixel pixel = pixel_of(known ? m : 0, arguments_.grid);
      pixel.p += place.h.origin;
      pixel.q += place.w.origin;
      p_[i] = known ? pixel.p : kNowhere;
      q_[i] = pixel.q;
      dy_pixel_[i] = static_cast<const T*>(arguments_.dy) +
                     offset_of(pixel, arguments_.dy_strides) + group_ * arguments_.dy_strides.k;
      y_pixel_[i] = static_cast<const T*>(arguments_.y) + offset_of(pixel, arguments_.y_strides) +
                    group_ * arguments_.y_strides.k;
    }
  }

  RF_DEVICE void gather(Left& loader, ptx::SharedAddress tile, int pass, const Column& second,
                        const T* const (&pixel)[Left::kRows], const PixelStrides& strides) {
    const Column& first = at_;
    loader.issue(tile, pass, [&](int i, int j) {
      const Column& at = j == 0 ? first : second;
      const int32_t up = at.r * arguments_.h.out_step;
      const int32_t left = at.s * arguments_.w.out_step;
      const auto p = static_cast<uint32_t>(p_[i] - up);
      const auto q = static_cast<uint32_t>(q_[i] - left);
      const bool inside = p < static_cast<uint32_t>(arguments_.h.out_size) &&
                          q < static_cast<uint32_t>(arguments_.w.out_size);
      const int64_t channel = kWidth == LoadWidth::kWide ? at.c : at.c * strides.k;
      return Source<T>{pixel[i] + (channel - up * strides.p - left * strides.q),
                       inside && at.r < reduction_.taps_r};
    });
  }

  // Of this thread's columns of the pass that has landed; behind the reduction's end any channel's.
  RF_DEVICE void load_scale(float (&scale)[Pattern::kUnit]) const {
    const float* from = arguments_.scale + group_;
    if constexpr (kWidth == LoadWidth::kWide) {
#pragma unroll
      for (int i = 0; i < Pattern::kUnit; i += kVectorLength<float>) {
        const auto part =
            ptx::load_global_read_only(reinterpret_cast<const Vector<float>*>(from + landed_ + i));
#pragma unroll
        for (int e = 0; e < kVectorLength<float>; ++e) scale[i + e] = part.lane[e];
      }
    } else {
#pragma unroll
      for (int i = 0; i < Pattern::kUnit; ++i) {
        scale[i] = ptx::load_global_read_only(from + wrapped(landed_ + i));
      }
    }
  }

  const ConvDgradArguments& arguments_;
  Reduction reduction_;  // output channels of the group, the phase's taps
  Left dy_;
  Left y_;
  Right filters_;
  Column at_;                       // of this thread's unit of the pass that is asked for next
  Column advance_;                  // from one pass to the next
  int32_t landed_;                  // channel of the unit that is scaled next
  int32_t group_;                   // first output channel of the group
  const T* dy_pixel_[Left::kRows];  // first tap, first channel of the group; may lie outside
  const T* y_pixel_[Left::kRows];
  int32_t p_[Left::kRows];  // row and column of the first tap
  int32_t q_[Left::kRows];
  Column row_;  // of the reduction, of the filters' row that is asked for next
  Column row_advance_;
  const T* weight_;  // the phase's first tap, the group's first filter, this thread's channel
  ColumnStrides filter_columns_;
  int32_t channels_left_;  // input channels from this thread's on
};

}  // namespace resnet_fused
