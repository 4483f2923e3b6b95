// What conv_bn_grad1x1's kernels are told, and the shape of a block's work. Plain values.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "divide.h"
#include "portable.h"
#include "tile_shape.h"

namespace resnet_fused {

// A block keeps the sums of kFilters x kChannels weights in its registers, by 8 warps of which
// kWarpsK stand along the filters, and goes over its pixels kPixels at a time. kBlocks blocks are
// to share a multiprocessor.
template <int kFilters_, int kChannels_, int kWarpsK_, int kStages_, int kBlocks_>
struct Grad1x1Shape {
  static constexpr int kFilters = kFilters_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kPixels = 32;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;

  // The weights' gradient: filters by channels.
  static constexpr int kWarpsK = kWarpsK_;
  static constexpr int kWarpK = kFilters / kWarpsK;
  static constexpr int kWarpC = kChannels / (kWarps / kWarpsK);
  static constexpr int kBlocksK = kWarpK / 16;
  static constexpr int kBlocksC = kWarpC / 16;
  // The input's: pixels by channels.
  static constexpr int kWarpsP = kChannels >= 256 ? 1 : 2;
  static constexpr int kWarpP = kPixels / kWarpsP;
  static constexpr int kWarpX = kChannels / (kWarps / kWarpsP);
  static constexpr int kBlocksP = kWarpP / 16;
  static constexpr int kBlocksX = kWarpX / 16;

  // 16-bit elements. A stage: dz, y, x; behind all of them h, in whose place dx is put together,
  // and the weights.
  static constexpr int kGradientBytes = kPixels * kFilters * 2;
  static constexpr int kInputBytes = kPixels * kChannels * 2;
  static constexpr int kStageBytes = 2 * kGradientBytes + kInputBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kWeightBytes = kFilters * kChannels * 2;
  static constexpr int kSharedBytes = kRingBytes + kInputBytes + kWeightBytes;

  static_assert(kStages >= 2 && kWarpK % 16 == 0 && kWarpC % 16 == 0 && kWarpX % 16 == 0);
};

// Pixels lie one behind the other, so many elements apart; channels side by side.
struct Grad1x1Arguments {
  const void* dz;             // [pixels][K]
  const void* y;              // [pixels][K]; null without coefficients
  const float* coefficients;  // [3, K] a, b, c; null: dz is what is multiplied
  const void* x;              // [pixels][C]
  const float* norm;          // [4, C]; null: neither BatchNorm nor ReLU below
  const void* weight;         // [K][C]
  const void* addend;         // [N, C, ..] at every addend_step-th row and column; null: none
  void* dx;                   // [pixels][C]
  float* sums;                // [sum_rows, C]: of dx, of dx (x - mean)
  void* dweight;              // [K, C] in any strides
  PixelStrides addend_strides;
  Divisor addend_step;
  PixelGrid grid;  // of dx
  int64_t dz_pixel;
  int64_t y_pixel;
  int64_t x_pixel;
  int64_t dx_pixel;
  int64_t weight_k;
  int64_t dweight_k;
  int64_t dweight_c;
  int32_t filters;   // K, at most kFilters
  int32_t channels;  // C
  int32_t columns;   // of blocks: C / kChannels, rounded up
  int32_t parts;     // of the pixels; each has one at least
  int32_t steps_each;
  int32_t sum_rows;  // 2; 0 without norm; behind a block's end 2, and 3 with a projection's
  bool float_dweight;
  float* partial;       // [part][K][C]
  float* partial_sums;  // [part][sum_rows][C]
};

// By mma.sync behind a block's end: x is `out`, which is read as it lies and masks; norm is null.
struct Grad1x1EndArguments {
  Grad1x1Arguments shared;
  const void* raw;       // [pixels][C]
  const void* residual;  // likewise; null: no projection
  const float* mean;     // [C], of raw
  const float* residual_mean;
  int64_t raw_pixel;
  int64_t residual_pixel;
};

}  // namespace resnet_fused
