// The pixels of a convolution's steps, as they lie in a ring, through the BatchNorm and ReLU of the
// layer before.
#pragma once

#include <cstdint>

#include "normed_rows.h"
#include "tap_steps.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The way of those who transform through the steps of their block's tiles, stage after stage.
template <class T, class Shape>
class NormedSteps : public TapSteps<T, Shape> {
 public:
  // thread: of those who transform.
  RF_DEVICE NormedSteps(const ConvTmaArguments& arguments, const NormedImages& images,
                        const TileWalk& walk, uint32_t thread)
      : TapSteps<T, Shape>(arguments, walk), rows_(images, thread) {}

  // Fetches the step's scale and shift, while it may still be on its way.
  RF_DEVICE void prepare() {
    const ConvTmaArguments& read = *this->arguments_;
    const Column& at = this->column_;
    rows_.fetch(this->channel_, at.c, read.reduction.channels);
    // Rows behind the last pixel are not stored, and may be either.
    if (at.c == 0 && is_padded(read)) {
      rows_.find_inside(read, at, this->tile_.pixels * Shape::kPixels);
    }
  }

  // A step that has come.
  RF_DEVICE void transform(ptx::SharedAddress stage) const {
    rows_.transform(stage + Shape::kPixelsAt);
  }

 private:
  NormedRows<T, Shape::kPixels> rows_;
};

#endif

}  // namespace resnet_fused
