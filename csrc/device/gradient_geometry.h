// What the kernels of a convolution's gradients are told. Plain values, which a launch computes.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "divide.h"
#include "portable.h"

namespace resnet_fused {

// A stage of the ring with a second tile of the left operand's layout behind both operands: y's,
// beside dy's.
template <class Shape>
struct MaskedShape : Shape {
  static constexpr int kMaskOffset = Shape::kStageBytes;
  static constexpr int kStageBytes = Shape::kStageBytes + Shape::kM * Shape::kStepBytes;
  static constexpr int kRingBytes = Shape::kStages * kStageBytes;
};

// conv_dgrad along one axis, vertical or horizontal. An input row h meets only those taps r for
// which h + padding - r dilation is a multiple of the stride. Rows of one remainder h % stride, a
// phase, meet the same taps, `tap_step` apart: no zero is multiplied.
struct PhasedAxis {
  int32_t size;  // of the input
  int32_t out_size;
  int32_t stride;
  int32_t padding;
  int32_t dilation;
  int32_t taps;      // of the filter
  int32_t tap_step;  // stride / gcd(stride, dilation)
  int32_t out_step;  // rows of the output from one of the phase's taps to the next, backwards:
                     // dilation / gcd(stride, dilation)
};

struct Phase {
  int32_t index;      // the remainder
  int32_t first_tap;  // 0 where there are none
  int32_t taps;
  int32_t origin;  // output row of the first tap, for the phase's first input row
};

RF_HOST_DEVICE Phase phase_of(int32_t index, const PhasedAxis& axis) {
  const int32_t start = index + axis.padding;
  const int32_t period = axis.tap_step < axis.taps ? axis.tap_step : axis.taps;
  for (int32_t tap = 0; tap < period; ++tap) {
    const int32_t distance = start - tap * axis.dilation;
    if (distance % axis.stride == 0) {
      const int32_t taps = (axis.taps - tap + axis.tap_step - 1) / axis.tap_step;
      return Phase{index, tap, taps, distance / axis.stride};
    }
  }
  return Phase{index, 0, 0, 0};
}

struct ConvDgradArguments {
  const void* dy;      // [N, K, P, Q]
  const void* y;       // [N, K, P, Q]; null without ReLU
  const void* weight;  // [K, C / groups, R, S]
  const float* scale;  // [K]
  void* dx;            // [N, C, H, W] in `dx_strides`
  // Those of what is read count 16 bytes where it is read wide, else elements; k's always elements.
  PixelStrides dy_strides;
  PixelStrides y_strides;
  ColumnStrides dy_columns;      // along the reduction: a channel, a tap of a phase
  ColumnStrides y_columns;       // likewise
  ColumnStrides filter_columns;  // likewise
  ColumnStrides filter_taps;     // elements: an output channel, a tap of the filter
  int64_t weight_c;              // elements, from one input channel to the next
  PixelStrides dx_strides;       // elements
  PhasedAxis h;
  PhasedAxis w;
  PixelGrid grid;       // input pixels of one phase
  int32_t channels_in;  // of a group: N
  int32_t channels_out;
  int32_t phases;
  TileGrid tiles;  // rows of tiles: those of one tile of pixels in all phases follow each other
  SplitWorkspace workspace;
  bool wide_dx;
  bool pixels_lie_together;
};

// A weight's gradient as a matrix product, whatever brings its operands: its parts, and where their
// sums go.
struct WgradProduct {
  const float* scale;  // [K]; null: every one is 1
  void* dweight;       // [K, C / groups, R, S]
  // N of the product: C / groups, or as many as whole boxes or rows of an image have, S or
  // likewise, R.
  Reduction columns;
  ColumnStrides dweight_columns;
  int64_t dweight_k;
  int32_t channels_in;   // C / groups
  int32_t taps_s;        // S
  int32_t channels_out;  // of a group: M
  int32_t columns_each;  // of a group: N
  int32_t steps;         // of the whole reduction
  int32_t steps_each;    // of a split; the last one may have fewer, and has one at least
  TileGrid tiles;
  float* partial;  // [tile][split][vector of a thread's sums][thread][4]; unused where none is left
};

struct WgradOperands {
  const void* dy;  // [N, K, P, Q]
  const void* y;   // [N, K, P, Q]; null without ReLU
  const void* x;   // [N, C, H, W]
  // From one output column q, row p, image to the next: 16 bytes where operands are read wide, else
  // elements.
  ColumnStrides dy_pixels;
  ColumnStrides y_pixels;
  ColumnStrides x_pixels;
  ColumnStrides x_taps;  // elements of x: an input channel, column, row
  int64_t dy_k;          // elements, from one output channel to the next
  int64_t y_k;
  Reduction pixels;  // Q, P, N: a reduction element is an output pixel
  int32_t height;
  int32_t width;
  int32_t stride_h;
  int32_t stride_w;
  int32_t padding_h;
  int32_t padding_w;
  int32_t dilation_h;
  int32_t dilation_w;
  bool wide_dweight;
};

// Operands come first: with the product ahead of them ptxas 13.0 spills a register of
// conv_bn_wgrad's tile of 64x64 on sm_80.
struct ConvWgradArguments : WgradOperands, WgradProduct {};

// conv_wgrad's operands between two BatchNorms: `dy` is the gradient behind the upper one, and with
// `y`, the convolution's raw output, it is read through that one's backward; x through the lower
// one and its ReLU. All parts leave their sums in `partial`.
struct ConvBnWgradArguments {
  ConvWgradArguments product;
  const float* coefficients;  // [3, K] a, b, c; null: dy is what is multiplied
  const float* norm;          // [4, C], of which scale and shift are read; null: x is
  int32_t filters;            // K
  int32_t channels;           // C
  int32_t out_width;          // Q, where rows of pixels are counted in whole steps
  bool float_dweight;         // whatever the operands are
};

}  // namespace resnet_fused
