// What conv_bn_grad1x1 for sm_90a is told, and the shape of a block's work. Numbers alone: the
// launches know it as well.
#pragma once

#include "../ptx/tensor_map.h"
#include "grad1x1_geometry.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// Maps of pixels {channels, pixels} in boxes of 64 channels of kPixels pixels, and of weights.
struct Grad1x1TmaArguments {
  ptx::TensorMap dz;
  ptx::TensorMap y;
  ptx::TensorMap x;
  ptx::TensorMap addend;
  ptx::TensorMap dx;
  ptx::TensorMap weight;  // {C, K} in boxes of 64 channels of all filters
  Grad1x1Arguments shared;
  bool maps_addend;  // one for each pixel, which lie one behind the other
};

// conv_bn_grad1x1_end's, which knows no norm: its x is `out`. What its sums are against is mapped
// as x is.
struct Grad1x1EndTmaArguments {
  Grad1x1TmaArguments image;
  ptx::TensorMap raw;
  ptx::TensorMap residual;
  const float* mean;           // [C]
  const float* residual_mean;  // [C]
  bool projected;              // residual and its mean are read
};

// A block keeps the weights of kFilters x kChannels in shared memory, and each of its two consuming
// warpgroups the sums of their gradient over its steps of kPixels pixels in registers. kEnded: its
// steps bring what a block's end needs.
template <int kFilters_, int kChannels_, int kPixels_, int kStages_, bool kEnded_ = false>
struct Grad1x1TmaShape {
  static constexpr int kFilters = kFilters_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kPixels = kPixels_;
  static constexpr int kStages = kStages_;
  static constexpr bool kEnded = kEnded_;
  static constexpr int kSumRows = kEnded ? 3 : 2;
  static constexpr int kBlocks = kChannels / kWarpgroupRows;  // of rows on the products' left side
  static constexpr int kFilterBoxes = kFilters / kStepElements;
  static constexpr int kSums = kBlocks * kFilters / 2;  // of the weights' gradient, in a thread
  static_assert(kChannels % kWarpgroupRows == 0 && kFilters % kStepElements == 0);
  static_assert(kFilters <= 256 && kSums <= 128 && kPixels % 16 == 0);
  static_assert(kStages % kConsumers == 0, "a stage is always the same consumer's");

  // From a multiple of 1024: the stages, each dz, y, x, the addend and an end's; the weights; what
  // each consumer puts together of dx; the ring's barriers, and the weights'.
  static constexpr int kBoxBytes = kPixels * kStepRowBytes;
  static constexpr int kGradientBytes = kFilterBoxes * kBoxBytes;
  static constexpr int kInputBytes = kBlocks * kBoxBytes;
  static constexpr int kGradientAt = 0;
  static constexpr int kMaskAt = kGradientBytes;
  static constexpr int kInputAt = kMaskAt + kGradientBytes;
  static constexpr int kAddendAt = kInputAt + kInputBytes;
  static constexpr int kRawAt = kAddendAt + kInputBytes;
  static constexpr int kResidualAt = kRawAt + kInputBytes;
  static constexpr int kStageBytes = kEnded ? kResidualAt + kInputBytes : kRawAt;
  static constexpr int kWeightsAt = kStages * kStageBytes;
  static constexpr int kWeightBoxBytes = kFilters * kStepRowBytes;
  static constexpr int kWeightBytes = kBlocks * kWeightBoxBytes;
  static constexpr int kStagingAt = kWeightsAt + kWeightBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kInputBytes;
  static constexpr int kWeightBarrierAt = kRingAt + ring_bytes(kStages);
  static constexpr int kSharedBytes = kWeightBarrierAt + kBarrierBytes;
  static_assert(kBoxBytes % kTileAlignment == 0);
  static_assert(kSharedBytes <= kMostSharedBytes);
  // One consumer hands its sums to the other where the stages were.
  static constexpr int kHandedSums = kSums + 2 * kSumRows * kBlocks;
  static_assert(kHandedSums * kWarpgroupThreads * 4 <= kWeightsAt);
};

// A block's part of the pixels and of the channels.
template <class Shape>
struct Grad1x1Part {
  int32_t number;
  int32_t channel;  // the first one
  int32_t begin;    // pixels
  int32_t end;

  RF_HOST_DEVICE Grad1x1Part(const Grad1x1Arguments& arguments, uint32_t block)
      : number(static_cast<int32_t>(block) / arguments.columns),
        channel(static_cast<int32_t>(block) % arguments.columns * Shape::kChannels) {
    const int32_t each = arguments.steps_each * Shape::kPixels;
    begin = number * each;
    end = arguments.grid.pixels - begin < each ? arguments.grid.pixels : begin + each;
  }
};

}  // namespace resnet_fused
