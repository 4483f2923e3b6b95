// The left operand of conv_bn_wgrad's products for sm_90a: BatchNorm's backward of dz, as a
// warpgroup makes it of 64 output channels in registers from what TMA has brought of dz and y.
//
// A thread has two of the channels, whose coefficients stay with it. What lies behind the last
// pixel comes as zeros, of which C would be made: it is put back to zeros.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_backward_operand.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class AffineChannels {
  using Box = StagedTile<Orientation::kChannelsLeft, kStepElements>;
  using Two = Unit<T, 2>;
  static constexpr int kDepth = kStepElements / kProducts;  // pixels of an instruction

 public:
  // coefficients: A of the warpgroup's first channel, those of B and C `next` and 2 `next` further;
  // null: dz is what is multiplied. channels: of the group, from that one on. pixels: from the
  // first step's first one on. thread: of the warpgroup.
  RF_DEVICE AffineChannels(const float* coefficients, int32_t next, int32_t channels,
                           int32_t pixels, uint32_t thread)
      : affine_(coefficients != nullptr), pixels_(pixels + kStepElements), thread_(thread) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {  // rows g and g + 8
      const auto row = static_cast<int32_t>(thread / 32 * 16 + thread % 32 / 4 + 8 * side);
#pragma unroll
      for (int which = 0; which < 3; ++which) {
        const bool known = affine_ && row < channels;
        coefficients_[side][which] =
            known ? ptx::load_global_read_only(coefficients + which * next + row) : 0.0f;
      }
    }
  }

  RF_DEVICE void prepare() { pixels_ -= kStepElements; }

  // The step, of which dz's box lies at `dz` and y's at `y`.
  RF_DEVICE void make(uint32_t (&a)[kProducts][4], ptx::SharedAddress dz,
                      ptx::SharedAddress y) const {
    const Box box(dz, thread_), raw(y, thread_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) box.load(a[i], i);
    if (!affine_) return;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      uint32_t words[4];
      raw.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float (&of)[3] = coefficients_[m % 2];
        const BackwardRows<2> rows{{of[0], of[0]}, {of[1], of[1]}, {of[2], of[2]}};
        auto two = __builtin_bit_cast(Two, a[i][m]);
        apply_backward(two, __builtin_bit_cast(Two, words[m]), rows);
        a[i][m] = __builtin_bit_cast(uint32_t, two);
      }
    }
    if (pixels_ < kStepElements) cut(a);
  }

 private:
  // Of the last step, zeros behind the last pixel.
  RF_DEVICE void cut(uint32_t (&a)[kProducts][4]) const {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const auto pixel =
            static_cast<int32_t>(kDepth * i + kDepth / 2 * (m / 2) + thread_ % 4 * 2);
        if (pixel >= pixels_) a[i][m] = 0;
        if (pixel + 1 >= pixels_) a[i][m] &= 0xFFFFu;
      }
    }
  }

  bool affine_;
  int32_t pixels_;  // from the step's first one on
  uint32_t thread_;
  float coefficients_[2][3];
};

#endif

}  // namespace resnet_fused
