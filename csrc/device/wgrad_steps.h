// What asks TMA for the operands of a weight's gradient, step after step of a block's part.
#pragma once

#include <cstdint>

#include "../ptx/tma.h"
#include "wgrad_parts.h"
#include "wgrad_tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The producer's way through the steps of its block's part.
template <class Shape>
class WgradSteps {
 public:
  RF_DEVICE WgradSteps(const ConvWgradTmaArguments& arguments, const Tile& tile,
                       const WgradPart& part)
      : arguments_(arguments), pixel_(part.first_pixel), left_(part.steps) {
    const WgradProduct& product = arguments.product;
    filter_ = tile.group * product.channels_out + tile.m * Shape::kM;
    first_channel_ = tile.group * product.channels_in;
    first_column_ = column_of(tile.n * Shape::kN, product.columns);
  }

  RF_DEVICE bool done() const { return left_ == 0; }
  RF_DEVICE void next() {
    pixel_ += kStepElements;
    --left_;
  }
  RF_DEVICE uint32_t bytes() const {
    return Shape::kStageBytes - (arguments_.masked ? 0 : Shape::kLeftBoxes * Shape::kBoxBytes);
  }

  RF_DEVICE void load(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const Pixel at = pixel_of(pixel_, arguments_.grid);
    load_filters(&arguments_.dy, stage, at, full);
    if (arguments_.masked) load_filters(&arguments_.y, stage + Shape::kMaskAt, at, full);
    load_columns(stage + Shape::kRightAt, at, full);
  }

 protected:
  const ConvWgradTmaArguments& arguments_;
  int32_t pixel_;          // where the step begins
  int32_t first_channel_;  // of the group
  Column first_column_;    // of the tile

 private:
  RF_DEVICE void load_filters(const ptx::TensorMap* from, ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
#pragma unroll 1
    for (int i = 0; i < Shape::kLeftBoxes; ++i) {
      const int32_t filter = filter_ + i * kStepElements;
      if (arguments_.dense_dy) {
        ptx::tma_load(to + i * Shape::kBoxBytes, from, {filter, pixel_}, full);
      } else {
        // Beyond the last image TMA brings zeros, as for any place outside of the tensor.
        ptx::tma_load_im2col(to + i * Shape::kBoxBytes, from, {filter, at.q, at.p, at.n}, {0, 0},
                             full);
      }
    }
  }

  RF_DEVICE void load_columns(ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
    const Reduction& columns = arguments_.product.columns;
    const int32_t h = at.p * arguments_.stride_h + arguments_.origin_h;
    const int32_t w = at.q * arguments_.stride_w + arguments_.origin_w;
    Column column = first_column_;
#pragma unroll 1
    for (int i = 0; i < Shape::kRightBoxes; ++i) {
      // Behind the last tap there is nothing to multiply: zeros, for which memory is not asked.
      const bool known = column.r < columns.taps_r;
      const int32_t channel = known ? first_channel_ + column.c : arguments_.channels;
      if (arguments_.dense_x) {
        ptx::tma_load(to + i * Shape::kBoxBytes, &arguments_.x, {channel, pixel_}, full);
      } else {
        const int32_t s = known ? column.s * arguments_.step_w : 0;
        const int32_t r = known ? column.r * arguments_.step_h : 0;
        ptx::tma_load_im2col(to + i * Shape::kBoxBytes, &arguments_.x, {channel, w, h, at.n},
                             {static_cast<uint16_t>(s), static_cast<uint16_t>(r)}, full);
      }
      column = advanced(column, {kStepElements, 0, 0}, columns);
    }
  }

  int32_t left_;  // steps
  int32_t filter_;
};

#endif

}  // namespace resnet_fused
