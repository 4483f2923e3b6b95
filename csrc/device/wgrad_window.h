// What the window kernel of a weight's gradient for sm_90a is told, and the shape of its tiles.
// Numbers alone: the launches know it as well.
//
// For 3x3 filters of stride 1 and padding 1. The reduction's elements are positions of the output's
// walk (conv_window.h), so that one window of the input's walk is the right operand of all nine
// taps. At positions that are no pixel dy is zero, whatever the taps see there.
#pragma once

#include "../ptx/tensor_map.h"
#include "conv_window.h"
#include "gradient_geometry.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

struct BnWgradWindowArguments {
  ptx::TensorMap x;   // im2col {C, W, H, N}: the input's walk, a part of a window
  ptx::TensorMap dz;  // im2col {K, Q, P, N}: the output's walk, a step
  ptx::TensorMap y;   // as dz
  WgradProduct product;
  const float* coefficients;  // [3, K] a, b, c; null: dz is what is multiplied
  const float* scale;         // [C]; null: x is read as it is
  const float* shift;         // [C]
  PixelGrid walk;             // positions up to the last pixel; Q + 1; P + 1
  int32_t part_rows;          // of a window, that one request brings: a multiple of 8
  int32_t parts;              // of a window
  int32_t filters;            // K
  bool float_dweight;         // whatever the operands are

  RF_HOST_DEVICE int32_t window_bytes() const { return parts * part_rows * kStepRowBytes; }
};

// 64 output channels by nine taps of 64 input channels. A step is kPositions of the walk. Each of
// two warpgroups has four taps, and half of the channels of the fifth one.
template <int kPositions_, int kStages_>
struct WgradWindowShape {
  static constexpr int kPositions = kPositions_;
  static constexpr int kStages = kStages_;
  static constexpr int kM = kWarpgroupRows;
  static constexpr int kN = kWindowTaps * kWindowChannels;
  static constexpr int kHalves = kPositions / kStepElements;  // that dy is turned by
  static constexpr int kStepBytes = kPositions * 2;           // of the reduction, in a step
  static_assert(kHalves == 2, "the left sides of two lie in registers");

  static constexpr int kTaps = kWindowTaps / kConsumers;        // of one, and half of another
  static constexpr int kMiddle = kWindowTaps / 2;               // the tap that both share
  static constexpr int kShared = kWindowChannels / kConsumers;  // its columns of one

  // The sums' places among a tile's, as the kernel knows them that adds the parts: by the shared
  // columns, as if each had a warpgroup of its own.
  static constexpr int kThreads = kN / kShared * kWarpgroupThreads;
  static constexpr int kWarpM = 16;
  static constexpr int kWarpN = kShared;
  static constexpr int kWarpsM = kM / kWarpM;

  // From a multiple of 1024: the ring's barriers; the stages, each dz, y and the window, whose size
  // a launch knows.
  static constexpr int kBoxBytes = kPositions * kStepRowBytes;
  static constexpr int kHalfBytes = kStepElements * kStepRowBytes;
  static constexpr int kMaskAt = kBoxBytes;
  static constexpr int kWindowAt = 2 * kBoxBytes;
  static constexpr int kStagesAt = kTileAlignment;
};

}  // namespace resnet_fused
