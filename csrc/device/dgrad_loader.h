// The loaders of a convolution's gradient of its input: dy and y are gathered by the taps of a
// phase, filters brought, and in conv_dgrad dy becomes scale * dz in shared memory.
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
//
// Of each pixel a thread keeps what ConvLoader keeps of its: offsets and a bit for each tap.
template <class T, class Shape, LoadWidth kWidth>
class DgradLoader {
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using Left = RowLoader<T, Shape, kWidth, Shape::kM>;
  using Right = MnMajorLoader<T, Shape, kWidth, Shape::kN>;
  using Offset = StrideOffset<kWidth>;

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
    advance_ = column_of(Pattern::kAdvance, reduction_);
    const int32_t first_filter = place.group * arguments.channels_out;
    start_gather(place, static_cast<int32_t>(thread / Pattern::kLanes), first_filter);

    row_ = column_of(first_element + filters_.row(), reduction_);
    row_advance_ = column_of(Right::kRowStep, reduction_);
    const int32_t n = place.n + filters_.column();
    channels_left_ = arguments.channels_in - n;
    const ColumnStrides& taps = arguments.filter_taps;
    const int64_t filter = first_filter * taps.c + place.h.first_tap * taps.r +
                           place.w.first_tap * taps.s + n * arguments.weight_c;
    filter_ = static_cast<Offset>(kWidth == LoadWidth::kWide ? filter / Pattern::kUnit : filter);
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      const Column second =
          Pattern::kThroughRegisters ? advanced(at_, Column{1, 0, 0}, reduction_) : at_;
      gather(dy_, stage, pass, second, arguments_.dy, dy_pixel_, arguments_.dy_columns);
      if (arguments_.y != nullptr) {
        gather(y_, stage + Shape::kMaskOffset, pass, second, arguments_.y, y_pixel_,
               arguments_.y_columns);
      }
      at_ = advanced(at_, advance_, reduction_);
    }
#pragma unroll
    for (int i = 0; i < Right::kRows; ++i) {
      const bool known = row_.r < reduction_.taps_r;
      const auto offset = along<Offset>(row_, arguments_.filter_columns);
      filters_.issue(right_of(stage), i, [&](int j) {
        const T* from =
            moved_by<T, kWidth>(static_cast<const T*>(arguments_.weight), filter_ + offset);
        return Source<T>{kWidth == LoadWidth::kWide ? from : from + j * arguments_.weight_c,
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

 protected:
  RF_DEVICE bool reads_y() const { return arguments_.y != nullptr; }
  // Where this thread's units of a pass that has landed lie, of its row i.
  RF_DEVICE ptx::SharedAddress dy_at(ptx::SharedAddress stage, int pass, int i) const {
    return dy_.address(stage, pass, i);
  }
  RF_DEVICE ptx::SharedAddress y_at(ptx::SharedAddress stage, int pass, int i) const {
    return y_.address(stage + Shape::kMaskOffset, pass, i);
  }
  // Whether they were read, of a tap inside of the output; zeros otherwise.
  RF_DEVICE bool was_read(int i, const Column& at) const {
    const uint32_t wanted = 1u << at.r | 1u << (at.s + kColumnBits);
    return at.r < reduction_.taps_r && (taps_[i] & wanted) == wanted;
  }
  RF_DEVICE const Reduction& reduction() const { return reduction_; }
  // From one pass to the next.
  RF_DEVICE const Column& advance() const { return advance_; }

 private:
  static constexpr int kColumnBits = 16;  // rows of taps have the bits 0-14, columns 16-30
  static_assert(kMostTaps < kColumnBits);

  static RF_DEVICE ptx::SharedAddress right_of(ptx::SharedAddress stage) {
    return stage + Shape::kM * Shape::kStepBytes;
  }

  // Which of the output positions first, first - step, .. exist: a bit for each of the taps.
  static RF_DEVICE uint32_t taps_inside(int32_t first, const PhasedAxis& axis, int32_t taps) {
    uint32_t inside = 0;
#pragma unroll 1
    for (int32_t tap = 0; tap < taps; ++tap) {
      const auto at = static_cast<uint32_t>(first - tap * axis.out_step);
      inside |= static_cast<uint32_t>(at < static_cast<uint32_t>(axis.out_size)) << tap;
    }
    return inside;
  }

  // Of a channel of a pixel, from the pixel's first one.
  static RF_DEVICE Offset channel_offset(int32_t channel, const PixelStrides& strides) {
    if constexpr (kWidth == LoadWidth::kWide) return channel / Pattern::kUnit;
    return static_cast<Offset>(channel * strides.k);
  }

  RF_DEVICE void start_gather(const DgradPlace& place, int32_t row, int32_t first_filter) {
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const int32_t m = place.m + row + i * Pattern::kRowStep;
      const bool known = m < arguments_.grid.pixels;
      Pixel pixel = pixel_of(known ? m : 0, arguments_.grid);
      pixel.p += place.h.origin;
      pixel.q += place.w.origin;
      taps_[i] = known ? taps_inside(pixel.p, arguments_.h, place.h.taps) |
                             taps_inside(pixel.q, arguments_.w, place.w.taps) << kColumnBits
                       : 0;
      dy_pixel_[i] = static_cast<Offset>(offset_of(pixel, arguments_.dy_strides)) +
                     channel_offset(first_filter, arguments_.dy_strides);
      y_pixel_[i] = static_cast<Offset>(offset_of(pixel, arguments_.y_strides)) +
                    channel_offset(first_filter, arguments_.y_strides);
      ptx::keep(taps_[i]);
      ptx::keep(dy_pixel_[i]);
      ptx::keep(y_pixel_[i]);
    }
  }

  RF_DEVICE void gather(Left& loader, ptx::SharedAddress tile, int pass, const Column& second,
                        const void* tensor, const Offset (&pixel)[Left::kRows],
                        const ColumnStrides& strides) {
    const auto* from = static_cast<const T*>(tensor);
    loader.issue(tile, pass, [&](int i, int j) {
      Column at = j == 0 ? at_ : second;
      const bool valid = was_read(i, at);
      if constexpr (kWidth == LoadWidth::kWide) at.c /= Pattern::kUnit;
      return Source<T>{moved_by<T, kWidth>(from, pixel[i] + along<Offset>(at, strides)), valid};
    });
  }

  const ConvDgradArguments& arguments_;
  Reduction reduction_;  // output channels of the group, the phase's taps
  Left dy_;
  Left y_;
  Right filters_;
  Column at_;       // of this thread's unit of the pass that is asked for next
  Column advance_;  // from one pass to the next
  // To the group's first channel of the first tap, which may lie outside.
  Offset dy_pixel_[Left::kRows];
  Offset y_pixel_[Left::kRows];
  uint32_t taps_[Left::kRows];  // those inside of the output
  Column row_;                  // of the reduction: the filters' row that is asked for next
  Column row_advance_;
  Offset filter_;  // to the phase's first tap, the group's first filter, this thread's channel
  int32_t channels_left_;  // input channels from this thread's on
};

// conv_dgrad's: scale * dz takes dy's place, where a thread has copied it itself.
template <class T, class Shape, LoadWidth kWidth>
class MaskedDgradLoader : public DgradLoader<T, Shape, kWidth> {
  using Base = DgradLoader<T, Shape, kWidth>;
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using LeftUnit = Unit<T, Pattern::kUnit>;
  static constexpr int kRows = Shape::kM / Pattern::kRowStep;

 public:
  RF_DEVICE MaskedDgradLoader(const ConvDgradArguments& arguments, const DgradPlace& place,
                              int32_t first_element, uint32_t thread)
      : Base(arguments, place, first_element, thread),
        scale_(arguments.scale + place.group * arguments.channels_out) {
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    landed_ = column_of(first_element + lane * Pattern::kUnit, this->reduction()).c;
  }

  RF_DEVICE void arrived(ptx::SharedAddress stage) {
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      float scale[Pattern::kUnit];
      load_scale(scale);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ptx::SharedAddress at = this->dy_at(stage, pass, i);
        auto unit = ptx::load_shared<LeftUnit>(at);
        if (this->reads_y()) {
          scale_and_mask(unit, ptx::load_shared<LeftUnit>(this->y_at(stage, pass, i)), scale);
        } else {
          scale_only(unit, scale);
        }
        ptx::store_shared(at, unit);
      }
      landed_ = wrapped(landed_ + this->advance().c);
    }
  }

 private:
  RF_DEVICE int32_t wrapped(int32_t c) const {
    return c >= this->reduction().channels ? c - this->reduction().channels : c;
  }

  // Of this thread's columns of the pass that has landed; behind the reduction's end any channel's.
  RF_DEVICE void load_scale(float (&scale)[Pattern::kUnit]) const {
    if constexpr (kWidth == LoadWidth::kWide) {
#pragma unroll
      for (int i = 0; i < Pattern::kUnit; i += kVectorLength<float>) {
        const auto part = ptx::load_global_read_only(
            reinterpret_cast<const Vector<float>*>(scale_ + landed_ + i));
#pragma unroll
        for (int e = 0; e < kVectorLength<float>; ++e) scale[i + e] = part.lane[e];
      }
    } else {
#pragma unroll
      for (int i = 0; i < Pattern::kUnit; ++i) {
        scale[i] = ptx::load_global_read_only(scale_ + wrapped(landed_ + i));
      }
    }
  }

  const float* scale_;  // of the group's first channel
  int32_t landed_;      // channel of the unit that is scaled next
};

}  // namespace resnet_fused
