// The left operand of conv_wgrad's products for sm_90a: dy, masked by the ReLU, as a warpgroup
// takes 64 output channels of it into registers from what TMA has brought.
//
// In shared memory a row is a pixel, the reduction's element: loads turn it over. Bits pass or are
// cut off; the scale waits for the sums.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_mask.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class MaskedChannels {
  using Box = StagedTile<Orientation::kChannelsLeft, kStepElements>;
  using Two = Unit<T, 2>;

 public:
  // thread: of the warpgroup.
  RF_DEVICE MaskedChannels(bool masked, uint32_t thread) : masked_(masked), thread_(thread) {}

  RF_DEVICE void prepare() const {}

  // The step, of which dy's box lies at `dy` and y's at `y`.
  RF_DEVICE void make(uint32_t (&a)[kProducts][4], ptx::SharedAddress dy,
                      ptx::SharedAddress y) const {
    const Box box(dy, thread_), passed(y, thread_);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) box.load(a[i], i);
    if (!masked_) return;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      uint32_t words[4];
      passed.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        auto two = __builtin_bit_cast(Two, a[i][m]);
        mask(two, __builtin_bit_cast(Two, words[m]));
        a[i][m] = __builtin_bit_cast(uint32_t, two);
      }
    }
  }

 private:
  bool masked_;
  uint32_t thread_;
};

#endif

}  // namespace resnet_fused
