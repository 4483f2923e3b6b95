// The operands of a 3x3 convolution, or of its input's gradient, of stride, padding and dilation 1,
// whose pixels come once for all nine taps, and are turned once for all of them: read through the
// BatchNorm and ReLU of the layer before, or through the backward of the one behind.
//
// The pixels of a tile follow one another through rows and images, and tap (r, s) of each lies
// (r - 1) Q + s - 1 further in that order. So the pixels that a tile's taps read are one run: its
// own and Q + 1 on either side. A slice of its channels lies in shared memory as such a window; a
// tap enters it r Q + s rows further down, and where it lies beside the image the lanes that name
// rows for ldmatrix name zeros. While a slice multiplies, the next one's window lands.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "gradient_mask.h"
#include "halo_shape.h"
#include "main_loop.h"
#include "vector.h"

namespace resnet_fused {

// Operands: whose pixels and filters these are. `grid()`, `height()`, `width()`, of the pixels;
// `channels()` of the reduction. `issue_filters(stage, c, r, s)`: those of the slice from channel c
// on, of the tap that a window is entered for at (r, s). `copy(at, beside, pixel, c, known)`: 16
// bytes of a pixel's channels to `at`, and what they are to be turned with to `beside`, of a window
// of its own. `turns()`; `coefficients(c)`, and `turn(unit, beside, coefficients)`.
template <class T, class Shape, class Operands>
class HaloLoader {
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowStep = Shape::kThreads / kLoadLanes;
  static constexpr int kAhead = Shape::kStages - 1;
  static constexpr int kBits = 2 * kHaloSide;  // of a row: its rows of taps, its columns of taps
  static_assert(kAhead < kHaloTaps && kBits * Shape::kBlocksM <= 32);
  using PixelUnit = Unit<T, kUnit>;
  static_assert(kHaloRowBytes == KMajor::kRowBytes);

 public:
  static constexpr int kSlice = Shape::kStepBytes / static_cast<int>(sizeof(T));  // channels

  // `slices` of the channels from slice `first` on, for the tile from pixel `m` on. shared:
  // halo_bytes, at a multiple of a line.
  RF_DEVICE HaloLoader(const Operands& operands, int32_t m, int32_t first, int32_t slices,
                       ptx::SharedAddress shared, const Place<Shape>& place)
      : operands_(operands),
        zeros_(shared),
        thread_(place.thread),
        first_pixel_(m - operands.width() - 1),
        wanted_(first * kSlice),
        landed_(wanted_),
        end_((first + slices) * kSlice) {
    // As KMajorFragments has it: matrices 0-3 are (rows 0-7, chunk 0), (8-15, 0), (0-7, 1), (8-15,
    // 1).
    const uint32_t matrix = place.lane / 8;
    lane_row_ = place.row + matrix % 2 * 8 + place.lane % 8;
    lane_chunk_ = matrix / 2;
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      // Behind the last pixel: of which nobody stores what comes.
      const Pixel pixel = pixel_of(m + static_cast<int32_t>(lane_row_) + i * 16, operands.grid());
      uint32_t taps = (1u << kBits) - 1;
      if (pixel.p == 0) taps &= ~1u;
      if (pixel.p == operands.height() - 1) taps &= ~4u;
      if (pixel.q == 0) taps &= ~8u;
      if (pixel.q == operands.width() - 1) taps &= ~32u;
      inside_ |= taps << kBits * i;
    }
  }

  // Before the first step: its window, and the zeros.
  RF_DEVICE void begin() {
    if (thread_ < kHaloZeroBytes / kChunkBytes) {
      ptx::store_shared(zeros_ + thread_ * kChunkBytes, PixelUnit{});
    }
    copy_window(wanted_, 0);
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
    operands_.issue_filters(stage, wanted_, wanted_r_, wanted_s_);
    // By now the taps of the slice before are done with, and this one's window is turned.
    if (wanted_r_ * kHaloSide + wanted_s_ == kAhead && wanted_ + kSlice < end_) {
      copy_window(wanted_ + kSlice, 1 - wanted_window_);
    }
    if (++wanted_s_ < kHaloSide) return;
    wanted_s_ = 0;
    if (++wanted_r_ < kHaloSide) return;
    wanted_r_ = 0;
    wanted_ += kSlice;
    wanted_window_ = 1 - wanted_window_;
  }
  RF_DEVICE void land(ptx::SharedAddress) const {}

  // Turns a slice's window ahead of its first tap; then each tap's place in it.
  RF_DEVICE void arrived(ptx::SharedAddress) {
    const ptx::SharedAddress window = window_at(landed_window_);
    const bool first = landed_r_ == 0 && landed_s_ == 0;
    if (first && operands_.turns()) turn(window);
    const uint32_t row =
        lane_row_ + static_cast<uint32_t>(landed_r_ * operands_.width() + landed_s_);
    place_ = window + KMajor::offset(row, lane_chunk_);
    tap_ = 1u << landed_r_ | 1u << (kHaloSide + landed_s_);
    if (++landed_s_ < kHaloSide) return;
    landed_s_ = 0;
    if (++landed_r_ < kHaloSide) return;
    landed_r_ = 0;
    landed_ += kSlice;
    landed_window_ = 1 - landed_window_;
  }

  // The row that this lane names of the warp's i-th block: of the tap that arrived last. Zeros lie
  // in the banks of what they stand for.
  RF_DEVICE ptx::SharedAddress row_of_block(int i) const {
    const uint32_t tap = tap_ << kBits * i;
    return (inside_ & tap) == tap ? place_ + i * (16 * KMajor::kRowBytes)
                                  : zeros_ + place_ % kHaloZeroBytes;
  }

 private:
  RF_DEVICE int32_t lane() const { return static_cast<int32_t>(thread_ % kLoadLanes); }
  RF_DEVICE int32_t row_of_thread() const { return static_cast<int32_t>(thread_ / kLoadLanes); }
  RF_DEVICE uint32_t rows() const {
    return static_cast<uint32_t>(halo_rows(Shape::kM, operands_.width()));
  }
  RF_DEVICE ptx::SharedAddress window_at(uint32_t window) const {
    return zeros_ + kHaloZeroBytes + window * rows() * KMajor::kRowBytes;
  }
  RF_DEVICE ptx::SharedAddress unit_at(ptx::SharedAddress window, int32_t row) const {
    return window + KMajor::offset(static_cast<uint32_t>(row), static_cast<uint32_t>(lane()));
  }

  // What lies in the window of what those in use are turned with.
  RF_DEVICE ptx::SharedAddress beside(int32_t row) const {
    return unit_at(window_at(kHaloWindows), row);
  }

  // Pixels ahead of the first image or behind the last one, and channels that a slice has too many
  // of, are zeros: no tap reads the former, and filters of the latter are zeros, too. Numbers of
  // pixels stay below 2^31: a launch leaves 4096 beyond its own, and no window fits so long a row.
  RF_DEVICE void copy_window(int32_t first_channel, uint32_t window) const {
    const int32_t c = first_channel + lane() * kUnit;
    const bool inside = c < operands_.channels();
    const ptx::SharedAddress at = window_at(window);
#pragma unroll 1
    for (int32_t row = row_of_thread(); row < static_cast<int32_t>(rows()); row += kRowStep) {
      const int32_t m = first_pixel_ + row;
      const Pixel pixel = pixel_of(m < 0 ? 0 : m, operands_.grid());
      operands_.copy(unit_at(at, row), beside(row), pixel, c,
                     m >= 0 && m < operands_.grid().pixels && inside);
    }
  }

  // Each thread what it has copied itself.
  RF_DEVICE void turn(ptx::SharedAddress window) const {
    const int32_t c = landed_ + lane() * kUnit;
    if (c >= operands_.channels()) return;
    const auto coefficients = operands_.coefficients(c);
#pragma unroll 2
    for (int32_t row = row_of_thread(); row < static_cast<int32_t>(rows()); row += kRowStep) {
      const ptx::SharedAddress at = unit_at(window, row);
      auto unit = ptx::load_shared<PixelUnit>(at);
      operands_.turn(unit, beside(row), coefficients);
      ptx::store_shared(at, unit);
    }
  }

  Operands operands_;
  ptx::SharedAddress zeros_;  // behind them the windows
  uint32_t thread_;
  int32_t first_pixel_;  // of a window's first row
  int32_t wanted_;       // first channel of the slice that is asked for next, and its tap
  int32_t wanted_r_ = 0;
  int32_t wanted_s_ = 0;
  uint32_t wanted_window_ = 0;
  int32_t landed_;  // likewise of the step that arrives next
  int32_t landed_r_ = 0;
  int32_t landed_s_ = 0;
  uint32_t landed_window_ = 0;
  int32_t end_;  // channels
  uint32_t lane_row_;
  uint32_t lane_chunk_;
  uint32_t inside_ = 0;           // taps inside of the image, kBits for each block of rows
  ptx::SharedAddress place_ = 0;  // of this lane's first row of the tap that arrived last
  uint32_t tap_ = 0;              // its bits
};

// A warp's fragments of the window, in the place of a KMajorFragments of pixels.
template <class Loader, class Shape>
struct HaloFragments {
  const Loader& loader;

  RF_DEVICE void load(uint32_t (&fragments)[Shape::kBlocksM][4], ptx::SharedAddress,
                      int slice RF_SITE_PARAMETER) const {
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      ptx::ldmatrix_x4(fragments[i], loader.row_of_block(i) ^
                                         (static_cast<uint32_t>(slice) * kSliceBytes) RF_SITE);
    }
  }
};

}  // namespace resnet_fused
