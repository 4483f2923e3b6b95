// The shape of a tile of conv_bn_act for sm_90a whose reduction is shared by a cluster of blocks,
// what lies where in a block's shared memory, and what the kernel is told. Numbers alone: the
// launches know it as well.
#pragma once

#include <cstdint>

#include "portable.h"
#include "tma_conv.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// A warpgroup multiplies; one thread of a warp asks for what it multiplies.
constexpr int kClusterThreads = kWarpgroupThreads + 32;
constexpr int kClusterResident = 2;  // blocks on a multiprocessor: the next launch's beside these
constexpr int kQuad = 4;             // channels that a thread stores at a time

// Filters on the left side. What conv_bn_act_sm90.cuh's steps and sums ask of a shape is here too.
template <int kPixels_, int kStages_>
struct ClusterShape {
  static constexpr Orientation kOrientation = Orientation::kChannelsLeft;
  static constexpr bool kPixelsLeft = false;
  static constexpr bool kTogether = true;
  static constexpr int kPixels = kPixels_;
  static constexpr int kChannels = kWarpgroupRows;
  static constexpr int kStages = kStages_;
  static constexpr int kSharing = 1;  // its blocks have different steps
  static constexpr int kColumns = kPixels;
  static constexpr int kReaders = kWarpgroupWarps;
  static constexpr int kStoredPixels = kPixels;
  static_assert(kPixels % 8 == 0, "whole patterns of the swizzle, and shares of 8 blocks");

  // From a multiple of 1024: the stages, each the filters and behind them the pixels; the ring's
  // barriers. When all steps have been read, the sums lie over the stages.
  static constexpr int kPixelBytes = kPixels * kStepRowBytes;
  static constexpr int kFilterBytes = kChannels * kStepRowBytes;
  static constexpr int kFilterPart = kChannels;
  static constexpr int kStageBytes = kPixelBytes + kFilterBytes;
  static constexpr int kFiltersAt = 0;
  static constexpr int kPixelsAt = kFilterBytes;
  static constexpr int kRightAt = kFilterBytes;
  static constexpr int kRingAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingAt + ring_bytes(kStages);
  static_assert(kStageBytes % kTileAlignment == 0);

  // Sums lie as [pixels][64 channels]. Units of eight channels change places with bits 1 and 2 of
  // the pixel: a fragment's eight channels by four pixels, two apart, are stored to 32 banks, and
  // what others read are whole aligned units.
  static constexpr int kSumsRowBytes = kChannels * 4;
  static_assert(kPixels * kSumsRowBytes <= kRingAt);
  static_assert(kClusterResident * (kSharedBytes + 1024) <= kMostSharedBytes);
};

// Behind ConvTmaArguments, what threads read and store by themselves.
struct ConvClusterArguments {
  ConvTmaArguments conv;
  const void* residual;    // [pixels][.., channels], null: none
  void* out;               // likewise
  int64_t residual_pixel;  // elements from one pixel to the next
  int64_t out_pixel;
};

// Of kSteps steps, those of the block `rank`: the first ones have one more.
struct StepShare {
  int32_t first;
  int32_t count;
};
RF_HOST_DEVICE StepShare share_of(int32_t steps, int32_t rank, int32_t blocks) {
  const int32_t each = steps / blocks;
  const int32_t more = steps - each * blocks;
  return {rank * each + (rank < more ? rank : more), each + (rank < more ? 1 : 0)};
}

}  // namespace resnet_fused
