// The left operand of conv_bn_wgrad's window kernel: BatchNorm's backward of dz as
// affine_channels.h makes it, of positions of a walk of which not all are pixels.
#pragma once

#include <cstdint>

#include "../ptx/warp.h"
#include "affine_channels.h"
#include "conv_geometry.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
class WalkedChannels {
 public:
  // made: the operand of any 64 positions, none of which it cuts off. position: the first one.
  // walk: of the output. thread: of the warpgroup.
  RF_DEVICE WalkedChannels(const AffineChannels<T>& made, const PixelGrid& walk, int32_t position,
                           uint32_t thread)
      : made_(made), walk_(walk), position_(position), thread_(thread) {}

  // Finds out which of the next 64 positions are pixels, while they may still be on their way.
  RF_DEVICE void prepare() {
#pragma unroll
    for (uint32_t& word : pixels_) {
      const int32_t m = position_ + static_cast<int32_t>(thread_ % 32);
      const bool pixel = is_pixel(pixel_of(m, walk_), m, walk_);
      // The thread's columns begin at 2 (lane % 4).
      word = ptx::ballot(ptx::kWholeWarp, pixel) >> thread_ % 4 * 2;
      position_ += 32;
    }
  }

  // Those, of which dz's box lies at `dz` and y's at `y`. Of what came as zeros C would be made.
  RF_DEVICE void make(uint32_t (&a)[kProducts][4], ptx::SharedAddress dz,
                      ptx::SharedAddress y) const {
    made_.make(a, dz, y);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int deeper = 0; deeper < 2; ++deeper) {
        const uint32_t pixels = pixels_[i / 2] >> (i % 2 * 16 + deeper * 8);
        const uint32_t kept = (pixels & 1 ? 0xFFFFu : 0) | (pixels & 2 ? 0xFFFF0000u : 0);
        a[i][2 * deeper] &= kept;
        a[i][2 * deeper + 1] &= kept;
      }
    }
  }

 private:
  AffineChannels<T> made_;
  const PixelGrid& walk_;
  int32_t position_;
  uint32_t thread_;
  uint32_t pixels_[2];  // bit by bit, from the thread's first column on
};

#endif

}  // namespace resnet_fused
