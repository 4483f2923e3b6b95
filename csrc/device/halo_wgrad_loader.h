// conv_bn_wgrad's operands of a 3x3 of stride, padding and dilation 1, whose input pixels come, and
// are turned, once for all nine taps; dz and y once for the taps of 16 channels of every warp.
//
// Along the reduction output pixels follow one another through rows and images, and tap (r, s) of
// each meets the input pixel (r - 1) Q + s - 1 further on. So a window that goes along with the
// reduction, Q + 1 pixels behind a step's and as many ahead, holds all that its taps read. Where a
// tap lies beside the image, the lanes that name rows for ldmatrix name zeros.
#pragma once

#include <cstdint>

#include "bn_wgrad_loader.h"
#include "halo_wgrad_shape.h"
#include "main_loop.h"
#include "mn_major.h"

namespace resnet_fused {

template <class T, class Shape>
class HaloWgradLoader
    : public AffineRows<T, Shape, LoadWidth::kWide, WgradRows<T, Shape, LoadWidth::kWide>> {
  using Base = AffineRows<T, Shape, LoadWidth::kWide, WgradRows<T, Shape, LoadWidth::kWide>>;
  using typename Base::Left;
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanes = Shape::kChannels / kUnit;  // threads along a window's row
  static constexpr int kStep = Shape::kStepBytes / static_cast<int>(sizeof(T));  // pixels
  static constexpr int kRowStep = Shape::kThreads / kLanes;
  using Layout = MnMajor<T, Shape::kChannels>;
  using PixelUnit = Unit<T, kUnit>;
  static_assert(Layout::kRowBytes == kHaloRowBytes && kStep == kHaloRingStep);
  static_assert(kStep % kRowStep == 0);

 public:
  RF_DEVICE HaloWgradLoader(const ConvBnWgradArguments& arguments, const Tile& tile,
                            int32_t first_pixel, ptx::SharedAddress shared,
                            const Place<Shape>& place)
      : Base(arguments, tile, first_pixel, place.thread),
        zeros_(shared),
        thread_(place.thread),
        last_row_(
            static_cast<uint32_t>(halo_ring_rows(Shape::kStages, arguments.product.width) - 1)),
        first_pixel_(first_pixel - arguments.product.width - 1) {
    const ConvWgradArguments& product = arguments.product;
    const int32_t c = tile.n * Shape::kChannels + static_cast<int32_t>(thread_ % kLanes) * kUnit;
    known_ = c < channels();
    channel_ = tile.group * channels() + (known_ ? c : 0);
    wanted_ = landed_ = static_cast<int32_t>(thread_ / kLanes);

    // As MnMajorFragments' right side: matrices 0-3 are (rows 0-7, 8 columns), (rows 8-15), and the
    // next 8 columns of both.
    const uint32_t matrix = place.lane / 8;
    lane_chunk_ = place.column / (kHaloTaps * kHaloSlice) * 2 + matrix / 2;
    lane_row_ = matrix % 2 * 8 + place.lane % 8;
#pragma unroll
    for (int i = 0; i < Shape::kSlices; ++i) {
      const auto row = static_cast<int32_t>(lane_row_) + i * (kStep / Shape::kSlices);
      pixel_[i] = column_of(first_pixel + row, product.pixels);
      inside_[i] = taps_inside(pixel_[i]);
    }
    advance_ = column_of(kStep, product.pixels);
  }

  // Before the first step.
  RF_DEVICE void begin() const {
    if (thread_ < kHaloZeroBytes / kChunkBytes) {
      ptx::store_shared(zeros_ + thread_ * kChunkBytes, PixelUnit{});
    }
  }

  // The first step brings all that its taps read, each other one as many pixels as it has.
  RF_DEVICE void issue(ptx::SharedAddress stage) {
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) this->issue_row(stage, i);
    steps_asked_ += kStep;
    copy_until(2 * (width() + 1) + steps_asked_);
  }
  RF_DEVICE void land(ptx::SharedAddress) const {}

  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    this->turn_gradient(stage);
    if (begun_) {
      lane_row_ += kStep;
#pragma unroll
      for (int i = 0; i < Shape::kSlices; ++i) {
        pixel_[i] = advanced(pixel_[i], advance_, this->whole_.product.pixels);
        inside_[i] = taps_inside(pixel_[i]);
      }
    }
    begun_ = true;
    steps_landed_ += kStep;
    turn_until(2 * (width() + 1) + steps_landed_);
  }

  // The row that this lane names, of the step that arrived last, a slice of it, and a tap.
  RF_DEVICE ptx::SharedAddress row_of(int slice, int tap) const {
    const int r = tap / kHaloSide, s = tap % kHaloSide;
    const int ahead = slice * (kStep / Shape::kSlices) + r * width() + s;
    const uint32_t row = (lane_row_ + static_cast<uint32_t>(ahead)) & last_row_;
    const ptx::SharedAddress at =
        zeros_ + kHaloZeroBytes + Layout::offset(row, lane_chunk_ * kChunkBytes);
    const uint32_t wanted = 1u << r | 8u << s;
    return (inside_[slice] & wanted) == wanted ? at : zeros_ + at % kHaloZeroBytes;
  }

 private:
  RF_DEVICE int32_t width() const { return this->whole_.product.width; }
  RF_DEVICE int32_t channels() const { return this->whole_.product.columns_each / kHaloTaps; }

  RF_DEVICE uint32_t taps_inside(const Column& pixel) const {
    const Reduction& pixels = this->whole_.product.pixels;
    if (pixel.r >= pixels.taps_r) return 0;
    uint32_t taps = (1u << 2 * kHaloSide) - 1;
    if (pixel.s == 0) taps &= ~1u;
    if (pixel.s == pixels.taps_s - 1) taps &= ~4u;
    if (pixel.c == 0) taps &= ~8u;
    if (pixel.c == pixels.channels - 1) taps &= ~32u;
    return taps;
  }

  RF_DEVICE ptx::SharedAddress unit_at(int32_t row) const {
    const uint32_t at = static_cast<uint32_t>(row) & last_row_;
    return zeros_ + kHaloZeroBytes + Layout::offset(at, thread_ % kLanes * kChunkBytes);
  }

  // Rows ahead of the first image or behind the last one are zeros: no tap reads them.
  RF_DEVICE void copy_until(int32_t end) {
    const ConvWgradArguments& product = this->whole_.product;
    const Reduction& pixels = product.pixels;
    const int32_t count = pixels.channels * pixels.taps_s * pixels.taps_r;
#pragma unroll 1
    for (; wanted_ < end; wanted_ += kRowStep) {
      const int32_t m = first_pixel_ + wanted_;
      const Column at = column_of(m < 0 ? 0 : m, pixels);
      const auto* from = static_cast<const T*>(product.x) +
                         int64_t{along<int32_t>(at, product.x_pixels)} * kUnit + channel_;
      ptx::cp_async<kChunkBytes>(unit_at(wanted_), from, known_ && m >= 0 && m < count);
    }
  }

  // Each thread what it has copied itself.
  RF_DEVICE void turn_until(int32_t end) {
    const ConvBnWgradArguments& arguments = this->whole_;
    if (arguments.norm == nullptr) return;
    float scale[kUnit], shift[kUnit];
    load_channels(scale, arguments.norm + channel_);
    load_channels(shift, arguments.norm + arguments.channels + channel_);
#pragma unroll 1
    for (; landed_ < end; landed_ += kRowStep) {
      auto unit = ptx::load_shared<PixelUnit>(unit_at(landed_));
      normalise(unit, scale, shift);
      ptx::store_shared(unit_at(landed_), unit);
    }
  }

  ptx::SharedAddress zeros_;  // behind them the window
  uint32_t thread_;
  uint32_t last_row_;    // rows of the window, less one
  int32_t first_pixel_;  // of the window's row 0
  int32_t channel_;      // of this thread's unit
  bool known_;           // it exists
  bool begun_ = false;
  int32_t steps_asked_ = 0;  // pixels
  int32_t steps_landed_ = 0;
  int32_t wanted_;  // row that is asked for next
  int32_t landed_;  // row that is turned next
  uint32_t lane_row_;
  uint32_t lane_chunk_;
  Column pixel_[Shape::kSlices];  // output pixel (q, p, n) of this lane's row of a slice
  Column advance_;
  uint32_t inside_[Shape::kSlices];  // the taps inside of the image: three rows, three columns
};

// A warp's fragments of the window, 16 channels of a tap each, in the place of a MnMajorFragments.
template <class Loader>
struct HaloTapFragments {
  const Loader& loader;

  RF_DEVICE void load_block(uint32_t (&fragment)[4], ptx::SharedAddress, int slice,
                            int block) const {
    ptx::ldmatrix_x4_trans(fragment, loader.row_of(slice, block));
  }
};

}  // namespace resnet_fused
