// What asks TMA for the operands of a weight's gradient, step after step of a block's part.
#pragma once

#include <cstdint>

#include "../ptx/tma.h"
#include "wgrad_cluster.h"
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
    first_column_ =
        column_of(tile.n * Shape::kN + right_boxes().first * kStepElements, product.columns);
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
    load_left(stage, full);
    load_right(stage, full);
  }
  RF_DEVICE void load_left(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    const Pixel at = pixel_of(pixel_, arguments_.grid);
    load_filters(&arguments_.dy, stage, at, full);
    if (arguments_.masked) load_filters(&arguments_.y, stage + Shape::kMaskAt, at, full);
  }
  RF_DEVICE void load_right(ptx::SharedAddress stage, ptx::SharedAddress full) const {
    load_columns(stage + Shape::kRightAt, pixel_of(pixel_, arguments_.grid), full);
  }

 protected:
  const ConvWgradTmaArguments& arguments_;
  int32_t pixel_;          // where the step begins
  int32_t first_channel_;  // of the group
  Column first_column_;    // of the tile, or of the block's part of it

 private:
  // Which boxes of a step a block asks for, and for whom: all of them, for itself alone, or its
  // part for all that share them.
  struct Boxes {
    int32_t first;
    int32_t end;
    uint16_t blocks;
  };
  static RF_DEVICE Boxes left_boxes() {
    if constexpr (Shape::kSharing > 1) {
      const WgradClusterPlace<Shape> place;
      const int32_t first = place.n * Shape::kLeftPart;
      return {first, first + Shape::kLeftPart, place.with_its_left()};
    } else {
      return {0, Shape::kLeftBoxes, 0};
    }
  }
  static RF_DEVICE Boxes right_boxes() {
    if constexpr (Shape::kSharing > 1) {
      const WgradClusterPlace<Shape> place;
      const int32_t first = place.m * Shape::kRightPart;
      return {first, first + Shape::kRightPart, place.with_its_right()};
    } else {
      return {0, Shape::kRightBoxes, 0};
    }
  }

  // The step's pixels of 64 channels. at: channel, column, row and image of the first one; offsets:
  // the tap's. Beyond the last image TMA brings zeros, as for any place outside of the tensor.
  template <bool kForAll>
  RF_DEVICE void load_box(ptx::SharedAddress to, const ptx::TensorMap* from, bool dense,
                          const int32_t (&at)[4], const uint16_t (&offsets)[2],
                          ptx::SharedAddress full, uint16_t blocks) const {
    if constexpr (kForAll) {
      if (dense) {
        ptx::tma_load_multicast(to, from, {at[0], pixel_}, full, blocks);
      } else {
        ptx::tma_load_im2col_multicast(to, from, at, offsets, full, blocks);
      }
    } else if (dense) {
      ptx::tma_load(to, from, {at[0], pixel_}, full);
    } else {
      ptx::tma_load_im2col(to, from, at, offsets, full);
    }
  }

  RF_DEVICE void load_filters(const ptx::TensorMap* from, ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
    const Boxes boxes = left_boxes();
#pragma unroll 1
    for (int i = boxes.first; i < boxes.end; ++i) {
      load_box<(Shape::kLeftSharing > 1)>(to + i * Shape::kBoxBytes, from, arguments_.dense_dy,
                                          {filter_ + i * kStepElements, at.q, at.p, at.n}, {0, 0},
                                          full, boxes.blocks);
    }
  }

  RF_DEVICE void load_columns(ptx::SharedAddress to, const Pixel& at,
                              ptx::SharedAddress full) const {
    const Reduction& columns = arguments_.product.columns;
    const int32_t h = at.p * arguments_.stride_h + arguments_.origin_h;
    const int32_t w = at.q * arguments_.stride_w + arguments_.origin_w;
    const Boxes boxes = right_boxes();
    Column column = first_column_;
#pragma unroll 1
    for (int i = boxes.first; i < boxes.end; ++i) {
      // Behind the last tap there is nothing to multiply: zeros, for which memory is not asked.
      const bool known = column.r < columns.taps_r;
      const int32_t channel = known ? first_channel_ + column.c : arguments_.channels;
      const int32_t s = known ? column.s * arguments_.step_w : 0;
      const int32_t r = known ? column.r * arguments_.step_h : 0;
      load_box<(Shape::kRightSharing > 1)>(
          to + i * Shape::kBoxBytes, &arguments_.x, arguments_.dense_x, {channel, w, h, at.n},
          {static_cast<uint16_t>(s), static_cast<uint16_t>(r)}, full, boxes.blocks);
      column = advanced(column, {kStepElements, 0, 0}, columns);
    }
  }

  int32_t left_;  // steps
  int32_t filter_;
};

#endif

}  // namespace resnet_fused
