// The window kernel of conv_bn_dgrad for sm_90a: what it is told, and what lies where in a block's
// shared memory. Numbers alone: the launches know it as well.
//
// The gradient of a 3x3 convolution's input by stride and padding 1 is such a convolution of dy,
// whose taps are the filter's from the last one backwards: conv_window.h has the walks and the
// tiles.
#pragma once

#include <cstdint>

#include "bn_dgrad_geometry.h"
#include "conv_window.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// Rows of a window that one request brings. y comes in such parts, through a ring of its own.
constexpr int64_t kMostGradientRows = 128;

// Of a thread that turns: 24 coefficients, and dz and y of two rows at a time.
constexpr int kTurnRegisters = 88;

// kPixels positions by 64 channels a tile, a tile for each of two warpgroups in turns. So many
// taps' filters lie in a block, with so many barriers.
template <int kPixels_, int kTaps, int kFilterBarriers>
struct BnDgradWindowLayout {
  static constexpr int kPixels = kPixels_;
  static constexpr int kStages = 2;  // parts of y
  static_assert(kPixels % 32 == 0 && kPixels <= 256);

  // From a multiple of 1024: the filters; for each consumer scratch for what it merges; barriers:
  // the parts' ring, the windows', the filters', one a consumer for what its tile's end reads and
  // one for its turn. Behind them what a launch knows the size of: staging tiles, one or two a
  // consumer; a window for each of them; y's parts.
  static constexpr int kScratchAt = kTaps * kWindowFilterBytes;
  static constexpr int kMergedBytes =
      (kWarpgroupThreads - kWarpgroupRows) * static_cast<int>(sizeof(ColumnSums));
  static constexpr int kScratchBytes = kMergedBytes + 16;
  static constexpr int kPartsAt = kScratchAt + kConsumers * kScratchBytes;
  static constexpr int kWindowRingAt = kPartsAt + ring_bytes(kStages);
  static constexpr int kFiltersFullAt = kWindowRingAt + ring_bytes(kConsumers);
  static constexpr int kOwnAt = kFiltersFullAt + kFilterBarriers * kBarrierBytes;
  static constexpr int kTurnsAt = kOwnAt + kConsumers * kBarrierBytes;
  static constexpr int kFixedEnd = kTurnsAt + kConsumers * kBarrierBytes;
  static constexpr int kStagingAt =
      (kFixedEnd + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static constexpr int kStagingBytes = kPixels * kStepRowBytes;
  static_assert(kStagingBytes % kTileAlignment == 0);
};

// Filters stay, of 64 filters' channels.
template <int kPixels>
struct BnDgradWindowShape : BnDgradWindowLayout<kPixels, kWindowTaps, 1> {};

// Filters come through a ring, of more of them in slices of 64: streamed_filters.h.
template <int kPixels, int kFilterStages_>
struct BnDgradStreamShape : BnDgradWindowLayout<kPixels, kFilterStages_, 2 * kFilterStages_> {
  static constexpr int kFilterStages = kFilterStages_;
};

struct BnDgradWindowArguments {
  // x is dz; weight {C, S, R, K}, of which a box is 64 filters' 64 channels; residual is what is
  // added; out is dx; scale and shift are those of the BatchNorm below, where there is one.
  ConvWindowArguments window;
  ptx::TensorMap y;             // as dz
  ptx::TensorMap raw;           // as what is added
  const float* coefficients;    // [3, K] A, B, C; null: dz is dy
  const float* mean;            // [C]
  bool reduced;                 // raw is read, dx masked, and sums are taken
  int32_t ends;                 // staging tiles of a consumer: one for each tensor of a tile's end
  int32_t slices;               // of 64 channels of dz
  GradientReduction reduction;  // a row of tiles is a tile
};

}  // namespace resnet_fused
