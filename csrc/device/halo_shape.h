// Tiles of a 3x3 convolution whose pixels lie in windows for all nine taps; see halo_loader.h.
#pragma once

#include <cstdint>

#include "portable.h"
#include "tile_shape.h"

namespace resnet_fused {

constexpr int kHaloSide = 3;
constexpr int kHaloTaps = kHaloSide * kHaloSide;
constexpr int kHaloWindows = 2;  // one in use, one arriving
constexpr int kHaloRowBytes = 64;
constexpr int kHaloZeroBytes = 128;  // a line of banks

// A TileShape whose stages hold filters alone; the windows' size is a launch's.
template <int kM, int kN, int kWarpsM, int kWarpsN, int kStages_, int kBlocks>
struct HaloShape : TileShape<kM, kN, kWarpsM, kWarpsN, kStages_, kBlocks> {
  static constexpr int kRightAt = 0;
  static constexpr int kStageBytes = kN * kHaloRowBytes;
  static constexpr int kRingBytes = kStages_ * kStageBytes;
  static_assert(kHaloRowBytes ==
                TileShape<kM, kN, kWarpsM, kWarpsN, kStages_, kBlocks>::kStepBytes);
};

// Rows of a window: a tile's pixels, and a row of the image and a pixel on either side. Even, as
// tiles are, so that a window ends with a line of banks.
RF_HOST_DEVICE constexpr int64_t halo_rows(int64_t pixels, int64_t width) {
  return pixels + 2 * (width + 1);
}
// Of zeros and all windows.
RF_HOST_DEVICE constexpr int64_t halo_bytes(int64_t pixels, int64_t width) {
  return kHaloZeroBytes + kHaloWindows * halo_rows(pixels, width) * kHaloRowBytes;
}

}  // namespace resnet_fused
