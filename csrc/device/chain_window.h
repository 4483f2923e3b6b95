// The kernel of conv_chain for sm_90a with a 3x3 convolution in front: what it is told, the shape
// of its tiles, and what lies where in the shared memory of a block. Plain values, which a launch
// computes on the host.
//
// A tile is so many positions of conv_window.h's walk. The 3x3 reads them as windows; shortcut,
// `out` and `next` have the same positions, of which those that are pixels are stored.
#pragma once

#include <cstdint>

#include "../ptx/tensor_map.h"
#include "chain_geometry.h"
#include "chain_tma.h"
#include "conv_window.h"
#include "portable.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

constexpr int kChainFront = kStepElements;  // channels of x, and of what the front makes of it

// How the filters into `next` come: all of them once, or those of each step with it.
enum class NextFilters { kStay, kStream };

// kNext channels of `next`; filters for kSteps steps of 64 channels of `out`, which stay for the
// block's life; kStages steps of a tile in flight or in use; kProjected channels of what the
// shortcut is made of, 0 for one that is a tensor.
template <int kNext_, int kSteps_, int kStages_, NextFilters kFilters, int kProjected_ = 0>
struct ChainWindowShape : ChainBoxes {
  static constexpr int kNext = kNext_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kStages = kStages_;
  static constexpr int kProjected = kProjected_;
  static constexpr bool kStreams = kFilters == NextFilters::kStream;
  static constexpr int kFront = kChainFront;
  static constexpr int kSharing = 1;
  static constexpr int kNextBoxes = kNext / kStepElements;
  static_assert(kNext % kStepElements == 0 && kNext <= 256);
  static_assert(kProjected == 0 || kProjected == kStepElements, "a box of it");
  static_assert(kStages >= 2, "one step in use, one arriving");

  static constexpr int kNextWeightBytes = kNext * kStepRowBytes;
  static constexpr FilterBytes kStaying{
      kWindowFilters, kWeightBytes * (kProjected > 0 ? 2 : 1) + (kStreams ? 0 : kNextWeightBytes)};
  static constexpr FilterBytes kStreamed{0, kStreams ? kNextWeightBytes : 0};

  // A stage: the shortcut, of which `out` takes the place, and filters into `next` that come by
  // steps.
  static constexpr int kShortcutBytes = kProjected > 0 ? 0 : kBoxBytes;
  static constexpr int kStageBytes = kShortcutBytes + (kStreams ? kNextWeightBytes : 0);
  static_assert(kStageBytes > 0);

  // From a multiple of 1024: the filters in front, of `out`, of its projection, of `next`; with a
  // projection its pixels, and a box where `out` is made; the stages; scale and shift of the front,
  // of `out`, of its projection and of `next`; barriers: the stages' ring, the window's, the
  // projection's, one for the filters; the window, whose size a launch knows.
  static constexpr int kWeightAt = kWindowFilters;
  static constexpr int kProjectionAt = kWeightAt + kSteps * kWeightBytes;
  static constexpr int kNextWeightAt = kProjectionAt + (kProjected > 0 ? kSteps * kWeightBytes : 0);
  static constexpr int kPixelsAt = kNextWeightAt + (kStreams ? 0 : kSteps * kNextWeightBytes);
  static constexpr int kOutAt = kPixelsAt + (kProjected > 0 ? kBoxBytes : 0);
  static constexpr int kStagesAt = kOutAt + (kProjected > 0 ? kBoxBytes : 0);
  static constexpr int kFrontVectorsAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kVectorsAt = kFrontVectorsAt + kChainFront * kChannelBytes;
  static constexpr int kVectorsBytes = kSteps * kStepElements * kChannelBytes;
  static constexpr int kProjectionVectorsAt = kVectorsAt + kVectorsBytes;
  static constexpr int kNextVectorsAt = kProjectionVectorsAt + (kProjected > 0 ? kVectorsBytes : 0);
  static constexpr int kRingAt = kNextVectorsAt + kNext * kChannelBytes;
  static constexpr int kWindowRingAt = kRingAt + ring_bytes(kStages);
  static constexpr int kPixelsRingAt = kWindowRingAt + ring_bytes(1);
  static constexpr int kFiltersFullAt = kPixelsRingAt + (kProjected > 0 ? ring_bytes(1) : 0);
  static constexpr int kBarriersEnd = kFiltersFullAt + kBarrierBytes;
  static constexpr int kWindowAt =
      (kBarriersEnd + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  static_assert(kStagesAt % kTileAlignment == 0 && kStageBytes % kTileAlignment == 0);
};

struct ChainWindowArguments {
  ptx::TensorMap x;           // im2col {B, W, H, N}: the input's walk, a part of a window
  ptx::TensorMap shortcut;    // im2col {C, W, H, N}: the output's walk, a tile; or of what is
                              // projected {D, W, H, N}
  ptx::TensorMap front;       // {B, S, R, K}: the filters of a tap
  ptx::TensorMap weight;      // {K, C}, 64 by 64
  ptx::TensorMap projection;  // {D, C}, likewise
  ptx::TensorMap next;        // {C, M}, 64 by kNext
  const float* front_scale;   // [K]
  const float* front_shift;
  const float* scale;  // [C]
  const float* shift;
  const float* projection_scale;  // [C]
  const float* projection_shift;
  const float* next_scale;  // [M]
  const float* next_shift;
  ChainResult out;
  ChainResult following;
  PixelGrid walk;         // positions up to the last pixel; W + 1; H + 1
  int32_t part_rows;      // of a window, that one request brings: a multiple of 8
  int32_t parts;          // of a window
  int32_t channels;       // C
  int32_t next_channels;  // M
  int32_t steps;          // of 64 of C
  int32_t tiles;
  bool thinned;    // of `out` the even rows and columns alone are stored
  bool reverse;    // tiles are walked from the last one
  bool dependent;  // the next kernel may begin early
  bool follows;    // this one may: for the launch, the kernel waits either way
};

}  // namespace resnet_fused
