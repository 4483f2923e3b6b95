// The left operand of conv_bn_dgrad's products for sm_90a: BatchNorm's backward of dz, as a
// warpgroup makes it in registers from what TMA has brought of dz and y. masked_operand.h says why
// there.
//
// What lies outside of the output comes as zeros, of which C would be made: it is put back to
// zeros by its place.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_dgrad_tma.h"
#include "gradient_mask.h"
#include "pair.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class AffineOperand {
  using Rows = StagedTile<Orientation::kPixelsLeft, kStepElements>;
  using Floats = Unit<float, 2>;
  static constexpr int kDepth = kStepElements / kProducts;  // channels of an instruction

 public:
  // thread: of the warpgroup.
  RF_DEVICE AffineOperand(const ConvBnDgradTmaArguments& arguments, uint32_t thread)
      : arguments_(arguments), thread_(thread) {}

  // A warpgroup's tile begins.
  RF_DEVICE void start(const ConvTmaArguments& conv, const OutputPlace& place) {
    conv_ = &conv;
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
    const ConvTmaArguments& conv = *conv_;
    const Reduction& reduction = conv.reduction;
    if (!arguments_.dgrad.masked) return;
    if (at_.c == 0) {  // a tap begins
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const auto h = static_cast<uint32_t>(h_[side] + at_.r * conv.step_h);
        const auto w = static_cast<uint32_t>(w_[side] + at_.s * conv.step_w);
        kept_[side] = h < arguments_.height && w < arguments_.width ? ~0u : 0u;
      }
    }
    // Of a whole step no channel is asked whether it exists: a thread's loads lie in fixed places
    // behind three addresses.
    if (at_.c + kStepElements <= reduction.channels) {
      fetch<true>(reduction.channels);
    } else {
      fetch<false>(reduction.channels);
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
        float dy[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float rest = __builtin_fmaf(of[1].value[e], half_of(words[m], e), of[2].value[e]);
          dy[e] = __builtin_fmaf(of[0].value[e], half_of(a[i][m], e), rest);
        }
        a[i][m] = narrow_pair<T>(dy[0], dy[1]) & kept_[m % 2];
      }
    }
  }

 private:
  // As words: a half that is its own value costs an instruction more.
  static RF_DEVICE float half_of(uint32_t word, int half) {
    return widen(T{static_cast<uint16_t>(word >> (16 * half))});
  }

  template <bool kWhole>
  RF_DEVICE void fetch(int32_t channels) {
    const int32_t first = at_.c + static_cast<int32_t>(thread_ % 4 * 2);
#pragma unroll
    for (int row = 0; row < 3; ++row) {
      const float* const from = rows_ + (row * arguments_.filters + first);
#pragma unroll
      for (int i = 0; i < 2 * kProducts; ++i) {
        const bool known = kWhole || first + kDepth / 2 * i < channels;
        const auto* const at = reinterpret_cast<const Floats*>(from + kDepth / 2 * i);
        coefficients_[i][row] = known ? ptx::load_global_read_only(at) : Floats{};
      }
    }
  }

  const ConvBnDgradTmaArguments& arguments_;
  uint32_t thread_;
  const ConvTmaArguments* conv_;  // of the tile
  const float* rows_;             // A, of the group
  Column at_;                     // of the step that is fetched next
  int32_t h_[2];                  // of dz, where the first tap of rows g and g + 8 lies
  int32_t w_[2];
  uint32_t kept_[2];  // what of a word of them counts: all, or nothing beside the output
  Floats coefficients_[2 * kProducts][3];
};

#endif

}  // namespace resnet_fused
