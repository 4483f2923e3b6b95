// What conv_bn_dgrad for sm_90a is told, and the shape of a block's tile. Numbers alone: the
// launches know it as well.
#pragma once

#include <cstdint>

#include "bn_dgrad_geometry.h"
#include "dgrad_tma.h"

namespace resnet_fused {

// What is added to every step-th row and column of a stride of 1: no map leaves out the others.
struct GatheredAddend {
  const void* first;  // null: it comes by TMA
  PixelStrides strides;
  Divisor step;
};

struct ConvBnDgradTmaArguments {
  // dy is dz; scale is [3, K] A, B, C, and y is read with them; residual is what is added, mapped
  // as dx is, unless it is gathered.
  ConvDgradTmaArguments dgrad;
  GatheredAddend gathered;
  ptx::TensorMap raw[kMostPhases];  // likewise
  const float* norm;                // [4, C]: scale, shift, mean
  bool reduced;                     // raw and norm are read, and sums are taken
  int32_t filters;                  // K, of all groups
  uint32_t height;                  // of dz
  uint32_t width;
  int32_t tiles_that_meet;      // of a phase's pixels, even where a phase has fewer
  GradientReduction reduction;  // a row of tiles is a warpgroup's, phase after phase
};

// conv_dgrad's, and behind its staging tiles those of raw, the sums of threads, scale and shift.
template <int kChannels_, int kStages_, int kFilterSharing_ = 1, int kPixelSharing_ = 1>
struct BnDgradTmaShape : DgradTmaShape<kChannels_, kStages_, kFilterSharing_, kPixelSharing_> {
  using Base = DgradTmaShape<kChannels_, kStages_, kFilterSharing_, kPixelSharing_>;
  static constexpr int kRawAt = Base::kRingAt;
  static constexpr int kThreadSumsAt = kRawAt + kConsumers * Base::kStagingBytes;
  static constexpr int kThreadSumsBytes = kWarpgroupThreads * 16 * 4;  // two of eight channels
  static constexpr int kVectorsAt = kThreadSumsAt + kConsumers * kThreadSumsBytes;
  static constexpr int kVectorsBytes = Base::kChannels * 2 * 4;
  static constexpr int kRingAt = kVectorsAt + kConsumers * kVectorsBytes;
  // Of each consumer one for the shortcut and one for raw, and a word.
  static constexpr int kOwnAt = kRingAt + Base::kRingBytes;
  static constexpr int kOwnBytes = 4 * kBarrierBytes;
  static constexpr int kSharedBytes = kOwnAt + kConsumers * kOwnBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

}  // namespace resnet_fused
