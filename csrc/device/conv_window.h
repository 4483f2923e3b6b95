// The window kernel of conv_bn_act for sm_90a: what it is told, the shape of its tiles, what lies
// where in a block's shared memory, and the walk that its tiles are cut from.
//
// For 3x3 filters of stride 1 and padding 1. Output pixels, and beside each row's end and below
// each image's last row a pixel that is none, follow one another in a walk: pixel (p, q) of image n
// is position (n (P + 1) + p) (Q + 1) + q. What it reads by tap (r, s) is pixel (p + r - 1, q + s -
// 1) of the input, and zero beside the image. In a walk over the input that begins with a zero
// before each row and a row of zeros before each image, that is r (Q + 1) + s positions further
// than the pixel's own number: the zero behind a row is the one before the next row, and so for
// images. So one window of the input's walk, as it lies in shared memory, is the operand of all
// nine taps, each of them entering it so many rows further down; only positions that are no pixel
// see anything else than their taps. Nothing of those is stored.
#pragma once

#include <cstdint>

#include "../ptx/tensor_map.h"
#include "conv_geometry.h"
#include "portable.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

constexpr int kWindowTaps = 9;
constexpr int kWindowChannels = kStepElements;  // of the input, whatever its type: a row's
// Bytes of 64 filters in 16 bits, of one tap and of all: these stay for the block's life.
constexpr int kWindowFilterBytes = kWarpgroupRows * kStepRowBytes;
constexpr int kWindowFilters = kWindowTaps * kWindowFilterBytes;

// Rows of a window for so many positions: up to the last tap of the last one.
RF_HOST_DEVICE constexpr int64_t window_rows(int64_t positions, int64_t width) {
  return positions + 2 * (width + 2);
}

// kPixels positions by 64 channels a tile, a tile for each of two warpgroups in turns; a window for
// each of them. kRowBytes: of a position's 64 channels. kPasses: products that lie side by side in
// a tile; of two, threads add up one's sums while the other one runs.
template <int kPixels_, int kRowBytes_ = kStepRowBytes, int kPasses_ = 1>
struct WindowShape {
  static constexpr int kPixels = kPixels_;
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kPasses = kPasses_;
  static constexpr int kColumns = kPixels / kPasses;  // of a product
  static constexpr int kStages = kConsumers;          // of the windows' ring
  static constexpr int kSharing = 1;
  static constexpr bool kTransforms = false;  // what has landed, before it is multiplied
  static_assert(kPixels % 16 == 0 && kPixels <= 256 && kColumns % 8 == 0);

  static constexpr int kFilterBytes = kWarpgroupRows * kRowBytes;  // of one tap
  static constexpr int kFilters = kWindowTaps * kFilterBytes;

  // From a multiple of 1024: the filters; a staging tile for each consumer, wide enough for 16
  // bits; barriers: the windows' ring, one for the filters, one a consumer for its shortcut and one
  // for its turn; the windows, whose size a launch knows.
  static constexpr int kStagingAt = kFilters;
  static constexpr int kStagingBytes = kPixels * kStepRowBytes;
  static constexpr int kRingAt = kStagingAt + kConsumers * kStagingBytes;
  static constexpr int kFiltersFullAt = kRingAt + ring_bytes(kConsumers);
  static constexpr int kResidualAt = kFiltersFullAt + kBarrierBytes;
  static constexpr int kTurnsAt = kResidualAt + kConsumers * kBarrierBytes;
  static constexpr int kSharedBytes = kTurnsAt + kConsumers * kBarrierBytes;  // but for windows
  static constexpr int kWindowsAt =
      (kSharedBytes + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static_assert(kStagingAt % kTileAlignment == 0 && kStagingBytes % kTileAlignment == 0);
};

// In 16 bytes, from one image, row or pixel to the next.
struct WindowStrides {
  int32_t n;
  int32_t p;
  int32_t q;
};

RF_HOST_DEVICE int64_t offset_of(const Pixel& at, const WindowStrides& strides) {
  return int64_t{at.n} * strides.n + int64_t{at.p} * strides.p + int64_t{at.q} * strides.q;
}

struct ConvWindowArguments {
  ptx::TensorMap x;         // im2col {C, W, H, N}: the input's walk, a part of a window
  ptx::TensorMap weight;    // {C, S, R, K}
  ptx::TensorMap residual;  // im2col {K, Q, P, N}: the output's walk, a tile
  void* out;                // [N, K, P, Q], channels adjacent
  const float* scale;       // [K]
  const float* shift;       // [K]
  WindowStrides out_strides;
  PixelGrid walk;         // positions up to the last pixel; Q + 1; P + 1
  int32_t part_rows;      // of a window, that one request brings: a multiple of 8
  int32_t parts;          // of a window
  int32_t tiles;          // of positions
  int32_t columns;        // tiles of 64 channels: a block has one for its life
  float floor;            // 0 for a ReLU, -infinity for none
  float residual_factor;  // of e4m3: what a stored 1 of the residual is worth
  float out_factor;       // and one over what a stored 1 of out is
  bool has_residual;
  bool reverse;    // tiles are walked from the last one
  bool dependent;  // the next kernel may begin early
  bool follows;    // this one may: for the launch, the kernel waits either way
};

}  // namespace resnet_fused
