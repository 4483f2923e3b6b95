// What conv_chain for sm_90a is told, the shape of its tiles, and what lies where in the shared
// memory of a block. Plain values, which a launch computes on the host.
#pragma once

#include <cstdint>

#include "../ptx/tensor_map.h"
#include "chain_geometry.h"
#include "portable.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

constexpr int kChainTmaPixels = kConsumers * kWarpgroupRows;  // of a tile
// Channels of `out`: their scales and shifts stay in shared memory.
constexpr int kChainTmaMostChannels = 1024;

// What the shapes of both kernels have in common. A box: 64 channels of the tile's pixels, the
// first half of them the first consumer's. kElement: bytes of a channel.
template <int kElement>
struct BoxesOf {
  static constexpr int kReaders = kConsumers * kWarpgroupWarps;  // warps that release a stage
  static constexpr int kRowBytes = kStepElements * kElement;
  static constexpr int kPartBytes = kWarpgroupRows * kRowBytes;
  static constexpr int kBoxBytes = kConsumers * kPartBytes;
  static constexpr int kWeightBytes = kStepElements * kRowBytes;  // 64 channels of 64 filters
  static constexpr int kChannelBytes = 2 * 4;                     // a channel's scale and shift
};
using ChainBoxes = BoxesOf<2>;

// Of a tile's filters, in bytes: for what stands in front of the chain, and for each step of `out`.
struct FilterBytes {
  int32_t front = 0;
  int32_t step = 0;
};

// kInner channels of what the first convolution reads, kNext of `next`, kStages steps of 64
// channels of `out` in flight or in use; kProjected channels of what the shortcut is made of, 0 for
// one that is a tensor; kElement bytes a channel; kSharing blocks of a cluster, with neighbouring
// tiles, that share their filters.
template <int kInner_, int kNext_, int kStages_, int kProjected_ = 0, int kElement = 2,
          int kSharing_ = 1>
struct ChainTmaShape : BoxesOf<kElement> {
  using Boxes = BoxesOf<kElement>;
  using Boxes::kBoxBytes, Boxes::kChannelBytes, Boxes::kRowBytes, Boxes::kWeightBytes;
  static constexpr int kInner = kInner_;
  static constexpr int kNext = kNext_;
  static constexpr int kStages = kStages_;
  static constexpr int kProjected = kProjected_;
  static constexpr int kSharing = kSharing_;
  static constexpr bool kInRings = false;  // a step lies in one stage
  static constexpr bool kOwnRows = false;  // the producer asks for rows
  static constexpr int kParts = 1;         // of what makes a step of `out`
  static constexpr int kEarlySteps = kStages;
  static constexpr int kInnerBoxes = kInner / kStepElements;
  static constexpr int kProjectedBoxes = kProjected / kStepElements;
  static constexpr int kNextBoxes = kNext / kStepElements;
  static_assert(kInner % kStepElements == 0 && kNext % kStepElements == 0 && kNext <= 256 &&
                kProjected % kStepElements == 0);
  static_assert(kStages >= 2, "one step in use, one arriving");

  // What a tile reads; first what the first convolution does.
  static constexpr int kRowsBytes = (kInnerBoxes + kProjectedBoxes) * kBoxBytes;

  // A stage: the shortcut, of which `out` takes the place, and filters: those that make `out`,
  // those of the projection, those that read `out`.
  static constexpr int kWeightAt = kBoxBytes;
  static constexpr int kNextWeightAt = kWeightAt + (kInnerBoxes + kProjectedBoxes) * kWeightBytes;
  static constexpr int kStageBytes = kNextWeightAt + kNext * kRowBytes;
  static constexpr int kArrivingBytes = kStageBytes - (kProjected > 0 ? kBoxBytes : 0);  // by TMA

  // From a multiple of 1024: the rows of two tiles; boxes of `next` for which a tile's rows have no
  // room; the stages; scale and shift of `out`, of its projection and of `next`; barriers.
  static constexpr int kMoreAt = 2 * kRowsBytes;
  static constexpr int kMoreBoxes = kNextBoxes > kInnerBoxes ? kNextBoxes - kInnerBoxes : 0;
  static constexpr int kNextAtOnce = kNextBoxes;  // boxes that have room there
  static constexpr int kStagesAt = kMoreAt + kMoreBoxes * kBoxBytes;
  static constexpr int kVectorsAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kProjectionVectorsAt = kVectorsAt + kChainTmaMostChannels * kChannelBytes;
  static constexpr int kNextVectorsAt =
      kProjectionVectorsAt + (kProjected > 0 ? kChainTmaMostChannels * kChannelBytes : 0);
  static constexpr int kRingAt = kNextVectorsAt + kNext * kChannelBytes;
  static constexpr int kRowsRingAt = kRingAt + ring_bytes(kStages);
  static constexpr int kSharedBytes = kRowsRingAt + ring_bytes(2);
  static_assert(kStageBytes % kTileAlignment == 0);
  static_assert(kWeightBytes / kSharing % kTileAlignment == 0, "parts of filters");
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// What chains of e4m3 are told beside scales and shifts, as conv_bn_act_fp8 is.
struct ChainFactors {
  float residual;    // what a stored 1 of the shortcut is worth
  float projection;  // one over it
  float out;         // one over what a stored 1 of `out` is worth
  float next;        // likewise of `next`
};

struct ChainTmaArguments {
  ptx::TensorMap x;           // {K, pixels}, boxes of 64 by a tile's pixels
  ptx::TensorMap shortcut;    // likewise {C, pixels}; projected {D, pixels}, or im2col
  ptx::TensorMap weight;      // {K, C}, 64 by a block's part of 64
  ptx::TensorMap projection;  // {D, C}, likewise
  ptx::TensorMap next;        // {C, M}, 64 by a block's part of kNext
  ptx::TensorMap out;         // {C, pixels}, 64 by a warpgroup's pixels
  ptx::TensorMap following;   // {M, pixels}, likewise
  const float* scale;         // [C]
  const float* shift;
  const float* projection_scale;  // [C]
  const float* projection_shift;
  const float* next_scale;  // [M]
  const float* next_shift;
  ChainResult even;       // in place of `out`, where its even rows and columns alone are stored
  PixelGrid grid;         // of all pixels
  int32_t channels;       // C
  int32_t next_channels;  // M
  int32_t stride;         // of a projection whose map is im2col {D, W, H, N}
  int32_t steps;          // of 64 of C
  int32_t tiles;          // as many for each block of a cluster
  ChainFactors factors;   // of e4m3 alone
  bool thinned;           // `even` is stored
  bool reverse;           // tiles are walked from the last one
  bool dependent;         // the next kernel may begin early
  bool follows;           // this one may: for the launch, the kernel waits either way
};

}  // namespace resnet_fused
