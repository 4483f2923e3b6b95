// The left operand of conv_bn_dgrad's products for sm_90a: BatchNorm's backward of dz, as a
// warpgroup makes it in registers from what TMA has brought of dz and y. masked_operand.h says why
// there.
//
// What lies outside of the output comes as zeros, of which C would be made: it is put back to
// zeros by its place.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_backward_operand.h"
#include "bn_dgrad_tma.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class AffineOperand {
  using Rows = StagedTile<Orientation::kPixelsLeft, kStepElements>;
  using Two = Unit<T, 2>;
  using Floats = Unit<float, 2>;
  static constexpr int kDepth = kStepElements / kProducts;  // channels of an instruction

 public:
  // thread: of the warpgroup.
  RF_DEVICE AffineOperand(const ConvBnDgradTmaArguments& arguments, uint32_t thread)
      : arguments_(arguments), thread_(thread) {}

  // A warpgroup's tile begins.
  RF_DEVICE void start(const OutputPlace& place) {
    const ConvTmaArguments& conv = arguments_.dgrad.conv;
    rows_ = conv.scale + place.group * conv.reduction.channels;
    at_ = {0, 0, 0};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto row = static_cast<int32_t>(thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * side);
      const Pixel pixel = pixel_of(place.pixel + row, conv.grid);
      h_[side] = pixel.p + conv.origin_h;
      w_[side] = pixel.q + conv.origin_w;
    }
  }

  // Fetches the next step's coefficients, while it may still be on its way.
  RF_DEVICE void prepare() {
    const ConvTmaArguments& conv = arguments_.dgrad.conv;
    const Reduction& reduction = conv.reduction;
    if (!arguments_.dgrad.masked) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto h = static_cast<uint32_t>(h_[side] + at_.r * conv.step_h);
      const auto w = static_cast<uint32_t>(w_[side] + at_.s * conv.step_w);
      inside_[side] = h < arguments_.height && w < arguments_.width;
    }
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      const int32_t c = at_.c + static_cast<int32_t>(kDepth / 2 * i + thread_ % 4 * 2);
      const bool known = c < reduction.channels;
#pragma unroll
      for (int row = 0; row < 3; ++row) {
        const auto* from = reinterpret_cast<const Floats*>(rows_ + row * arguments_.filters + c);
        coefficients_[i][row] = known ? ptx::load_global_read_only(from) : Floats{};
      }
    }
    at_.c += kStepElements;
    if (at_.c < reduction.channels) return;
    at_.c = 0;
    if (++at_.s < reduction.taps_s) return;
    at_.s = 0;
    ++at_.r;
  }

  // The step, of which dz's rows of this warpgroup begin at `dz` and y's at `y`.
  RF_DEVICE void make(uint32_t (&a)[kProducts][4], ptx::SharedAddress dz,
                      ptx::SharedAddress y) const {
    const Rows rows(dz, thread_), raw(y, thread_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) rows.load(a[i], i);
    if (!arguments_.dgrad.masked) return;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      uint32_t words[4];
      raw.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const Floats(&of)[3] = coefficients_[2 * i + m / 2];
        BackwardRows<2> coefficients;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          coefficients.a[e] = of[0].value[e];
          coefficients.b[e] = of[1].value[e];
          coefficients.c[e] = of[2].value[e];
        }
        auto two = __builtin_bit_cast(Two, a[i][m]);
        apply_backward(two, __builtin_bit_cast(Two, words[m]), coefficients);
        a[i][m] = inside_[m % 2] ? __builtin_bit_cast(uint32_t, two) : 0;
      }
    }
  }

 private:
  const ConvBnDgradTmaArguments& arguments_;
  uint32_t thread_;
  const float* rows_;  // A, of the group
  Column at_;          // of the step that is fetched next
  int32_t h_[2];       // of dz, where the first tap of rows g and g + 8 lies
  int32_t w_[2];
  bool inside_[2];
  Floats coefficients_[2 * kProducts][3];
};

#endif

}  // namespace resnet_fused
