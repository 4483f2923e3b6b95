// What a weight's gradient for sm_90a is told, and the shape of a block's tile. Numbers alone: the
// launches know it as well.
#pragma once

#include "../ptx/tensor_map.h"
#include "gradient_geometry.h"
#include "tma_conv.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// The reduction's elements are output pixels; a step is 64 of them. Of the product's sides come
// boxes of 64 channels of those pixels.
struct ConvWgradTmaArguments {
  ptx::TensorMap x;   // im2col {C, W, H, N}; with `dense_x` tiled {C, pixels}
  ptx::TensorMap dy;  // {K, Q, P, N} likewise
  ptx::TensorMap y;   // as dy
  WgradProduct product;
  PixelGrid grid;    // output pixels
  int32_t channels;  // of x, all groups': a box that begins there brings zeros
  int32_t stride_h;  // of neighbouring output pixels
  int32_t stride_w;
  int32_t origin_h;  // of pixel (0, 0)'s first tap: minus the padding
  int32_t origin_w;
  int32_t step_h;  // of neighbouring taps: the dilation
  int32_t step_w;
  bool dense_x;   // a 1x1 filter over pixels that lie one behind the other
  bool dense_dy;  // output pixels lie so, y's too
  bool masked;    // y is read
};

// conv_bn_wgrad's: dy is dz, the gradient behind the BatchNorm, and y what it has normalised.
struct ConvBnWgradTmaArguments {
  ConvWgradTmaArguments wgrad;
  const float* coefficients;  // [3, K] a, b, c; null: dz is what is multiplied
  int32_t filters;            // K
  NormedImages norm;          // of the layer before: x is read through it
  bool float_dweight;         // whatever the operands are
};

// Output channels on the left, of 64 or 128: the warpgroups lie along the columns, or along the
// channels. Columns, boxes of 64 input channels of one tap, on the right.
template <int kM_, int kN_, int kStages_>
struct WgradTmaShape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kStages = kStages_;
  static constexpr int kSharing = 1;  // blocks of a cluster
  static constexpr int kLeftSharing = 1, kRightSharing = 1;
  static constexpr bool kTransforms = false;           // what has landed, before it is multiplied
  static constexpr int kAlongM = kM / kWarpgroupRows;  // warpgroups
  static constexpr int kColumns = kN * kAlongM / kConsumers;  // of one
  static constexpr int kReaders = kConsumers * kWarpgroupWarps;
  static constexpr int kStepBytes = kStepRowBytes;  // of the reduction, in a step
  static_assert(kAlongM == 1 || kAlongM == kConsumers);
  static_assert(kColumns % kStepElements == 0 && kColumns <= 256);
  static_assert(kStages >= 2, "one step in use, one arriving");

  // The sums' places among a tile's, as the kernel knows them that adds the parts.
  static constexpr int kThreads = kConsumers * kWarpgroupThreads;
  static constexpr int kWarpM = 16;
  static constexpr int kWarpN = kColumns;
  static constexpr int kWarpsM = kM / kWarpM;

  // From a multiple of 1024: the stages, each dy's boxes, y's and x's; the ring's barriers.
  static constexpr int kBoxBytes = kStepElements * kStepRowBytes;
  static constexpr int kLeftBoxes = kM / kStepElements;
  static constexpr int kRightBoxes = kN / kStepElements;
  static constexpr int kMaskAt = kLeftBoxes * kBoxBytes;
  static constexpr int kRightAt = 2 * kMaskAt;
  static constexpr int kStageBytes = kRightAt + kRightBoxes * kBoxBytes;
  static constexpr int kRingAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingAt + ring_bytes(kStages);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// The same in clusters of blocks: kLeftSharing of them, with neighbouring tiles of columns, share
// dy and y, and kRightSharing, with neighbouring tiles of output channels, x. Each asks for its
// boxes of them, and they come to all. Its ring lies behind all else: wgrad_cluster.h.
template <class Shape, int kLeftSharing_, int kRightSharing_>
struct SharedWgradShape : Shape {
  static constexpr int kLeftSharing = kLeftSharing_;
  static constexpr int kRightSharing = kRightSharing_;
  static constexpr int kSharing = kLeftSharing * kRightSharing;
  static constexpr int kLeftPart = Shape::kLeftBoxes / kLeftSharing;  // that a block asks for
  static constexpr int kRightPart = Shape::kRightBoxes / kRightSharing;
  static_assert(kLeftPart * kLeftSharing == Shape::kLeftBoxes);
  static_assert(kRightPart * kRightSharing == Shape::kRightBoxes);
  // Full and empty, and beside them `taken` and `passed`.
  static constexpr int kSharedBytes = Shape::kRingAt + 2 * ring_bytes(Shape::kStages);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
