// A window of the input's walk where it has landed, turned once for all taps that enter it.
//
// The zeros that stand for what lies beside an image are known by their places alone: the first of
// each row, all of the first row of each image, and whatever follows the last pixel.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "transform_ring.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// One thread's part of a window: 64 channels of 16 bits a row.
class WindowRows : TransformUnits {
  // Rows whose places a warp works out together: for each lane's unit one of eight.
  static constexpr int kMasked = kLanes * kRowStep;

 public:
  using TransformUnits::channel;

  // walk: of the output. thread: of those who transform.
  RF_DEVICE WindowRows(const PixelGrid& walk, uint32_t thread)
      : TransformUnits(thread), walk_(walk) {}

  // transform(unit, inside) of each; inside: all bits of a word, or none. `window`: that of the
  // tile from `position` on, of so many rows.
  template <class Transform>
  RF_DEVICE void each(ptx::SharedAddress window, int32_t position, int32_t rows,
                      const Transform& transform) const {
#pragma unroll 1
    for (int32_t begun = 0; begun < rows; begun += kMasked) {
      uint32_t inside = rows_inside(position + begun);
      const int32_t left = rows - begun;
      TransformUnits::each(window + begun * kStepRowBytes, left < kMasked ? left : kMasked,
                           [&](RowUnit& unit) {
                             transform(unit, 0u - (inside & 1));
                             inside >>= 1;
                           });
    }
  }

 private:
  // Which of the thread's next rows, of those from `position` on, are pixels, bit by bit.
  RF_DEVICE uint32_t rows_inside(int32_t position) const {
    // A row and a pixel further than in the output's walk.
    const int32_t end = walk_.pixels + static_cast<int32_t>(walk_.columns.value) + 1;
    return which(0, [&](int32_t row) {
      const int32_t place = position + row;
      const Pixel at = pixel_of(place, walk_);
      return at.p > 0 && at.q > 0 && place < end;
    });
  }

  const PixelGrid& walk_;
};

#endif

}  // namespace resnet_fused
