// The tile of a weight's gradient of a 3x3 whose input pixels lie in a window that goes along the
// reduction; see halo_wgrad_loader.h.
#pragma once

#include <cstdint>

#include "halo_shape.h"

namespace resnet_fused {

// Input channels that a warp has all taps of: its columns are the taps, 16 channels each.
constexpr int kHaloSlice = 16;

// kM output channels by the columns of kWarpsN such slices. Stages hold dz and y alone.
template <int kM_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct HaloWgradShape
    : TileShape<kM_, kHaloTaps * kHaloSlice * kWarpsN_, kWarpsM_, kWarpsN_, kStages_, kBlocks_> {
  static constexpr int kWindows = 1;
  static constexpr int kMaskOffset = kM_ * kHaloRowBytes;
  static constexpr int kStageBytes = 2 * kMaskOffset;
  static constexpr int kRingBytes = kStages_ * kStageBytes;
  static constexpr int kChannels = kHaloSlice * kWarpsN_;
};

// Rows of the window: what the taps of a step read, and the steps under way. A power of two, in
// which the rows' numbers wrap.
constexpr int64_t kHaloRingStep = 32;  // pixels, of 16 bits
RF_HOST_DEVICE constexpr int64_t halo_ring_rows(int64_t stages, int64_t width) {
  int64_t rows = 64;
  while (rows < 2 * (width + 1) + stages * kHaloRingStep) rows *= 2;
  return rows;
}
// Of zeros and the window.
RF_HOST_DEVICE constexpr int64_t halo_ring_bytes(int64_t stages, int64_t width) {
  return kHaloZeroBytes + halo_ring_rows(stages, width) * kHaloRowBytes;
}

}  // namespace resnet_fused
