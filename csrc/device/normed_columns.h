// The columns of a weight's gradient, boxes of x as they lie in a ring, through the BatchNorm and
// ReLU of the layer before.
#pragma once

#include <cstdint>

#include "normed_rows.h"
#include "wgrad_steps.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The way of those who transform through the steps of their block's part. Each box has channels,
// and maybe a tap, of its own. What a step has behind the last pixel is zero, too: dy is zero
// there, but a zero times an infinite shift is none.
template <class T, class Shape>
class NormedColumns : public WgradSteps<Shape> {
 public:
  // thread: of those who transform.
  RF_DEVICE NormedColumns(const ConvWgradTmaArguments& arguments, const NormedImages& images,
                          const Tile& tile, const WgradPart& part, uint32_t thread)
      : WgradSteps<Shape>(arguments, tile, part), rows_(images, thread) {}

  // Fetches what belongs to the step's first box, while it may still be on its way.
  RF_DEVICE void prepare() {
    column_ = this->first_column_;
    fetch();
    if (cut()) find_inside();
  }

  // A step that has come. Boxes behind the last tap are multiplied for nothing.
  RF_DEVICE void transform(ptx::SharedAddress stage) {
    const Reduction& columns = this->arguments_.product.columns;
#pragma unroll 1
    for (int i = 0; i < Shape::kRightBoxes && column_.r < columns.taps_r; ++i) {
      if (i > 0) fetch();
      if (i > 0 && column_.c == 0 && cut()) find_inside();
      rows_.transform(stage + Shape::kRightAt + i * Shape::kBoxBytes);
      column_ = advanced(column_, {kStepElements, 0, 0}, columns);
    }
  }

 private:
  RF_DEVICE void fetch() {
    rows_.fetch(this->first_channel_, column_.c, this->arguments_.product.channels_in);
  }
  RF_DEVICE void find_inside() { rows_.find_inside(this->arguments_, column_, this->pixel_); }
  // Whether any of the step's pixels may lie beside an image, or behind the last one.
  RF_DEVICE bool cut() const {
    return is_padded(this->arguments_) ||
           this->arguments_.grid.pixels - this->pixel_ < kStepElements;
  }

  NormedRows<T, kStepElements> rows_;
  Column column_{0, 0, 0};  // of the box that is transformed next
};

#endif

}  // namespace resnet_fused
