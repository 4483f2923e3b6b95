// The left operand of conv_dgrad's products for sm_90a: dy, masked by the ReLU and scaled, as a
// warpgroup makes it in registers from what TMA has brought.
//
// With pixels on the left each warp has rows of its own, so that an element is turned once a step,
// and nothing is written back to shared memory: no barrier between turning and multiplying.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_mask.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class MaskedOperand {
  using Rows = StagedTile<Orientation::kPixelsLeft, kStepElements>;
  using Two = Unit<T, 2>;
  using Scales = Unit<float, 2>;
  static constexpr int kDepth = kStepElements / kProducts;  // channels of an instruction

 public:
  // scale: [channels of all groups]; channels: of a group, even where they are no whole step.
  RF_DEVICE MaskedOperand(const float* scale, int32_t channels, bool masked, uint32_t thread)
      : all_(scale), channels_(channels), masked_(masked), thread_(thread) {}

  // A tile of a group begins.
  RF_DEVICE void start(int32_t group) {
    scale_ = all_ + group * channels_;
    first_ = 0;
  }

  // Fetches the next step's scales, while it may still be on its way.
  RF_DEVICE void prepare() {
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      const int32_t c = first_ + static_cast<int32_t>(kDepth / 2 * i + thread_ % 4 * 2);
      const auto* from = reinterpret_cast<const Scales*>(scale_ + c);
      scales_[i] = c < channels_ ? ptx::load_global_read_only(from) : Scales{};
    }
    first_ += kStepElements;
    if (first_ >= channels_) first_ = 0;
  }

  // The step, of which dy's rows of this warpgroup begin at `dy` and y's at `y`.
  RF_DEVICE void make(uint32_t (&a)[kProducts][4], ptx::SharedAddress dy,
                      ptx::SharedAddress y) const {
    if (masked_) {
      turn<true>(a, dy, y);
    } else {
      turn<false>(a, dy, y);
    }
  }

 private:
  template <bool kMasked>
  RF_DEVICE void turn(uint32_t (&a)[kProducts][4], ptx::SharedAddress dy,
                      ptx::SharedAddress y) const {
    const Rows rows(dy, thread_), passed(y, thread_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      uint32_t words[4];
      rows.load(a[i], i);
      if constexpr (kMasked) passed.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const auto& scale = scales_[2 * i + m / 2].value;
        auto two = __builtin_bit_cast(Two, a[i][m]);
        if constexpr (kMasked) {
          scale_and_mask(two, __builtin_bit_cast(Two, words[m]), scale);
        } else {
          scale_only(two, scale);
        }
        a[i][m] = __builtin_bit_cast(uint32_t, two);
      }
    }
  }

  const float* all_;
  const float* scale_;  // of the group
  int32_t channels_;
  int32_t first_;  // channel of the step that is fetched next
  bool masked_;
  uint32_t thread_;  // of the warpgroup
  Scales scales_[2 * kProducts];
};

#endif

}  // namespace resnet_fused
