// Tiles of a 3x3 convolution, or of its input's gradient, whose pixels lie in windows for all nine
// taps; see halo_loader.h.
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

// Rows of a window: a tile's pixels, and a row of the image and a pixel on either side. Even, as
// tiles are, so that a window ends with a line of banks.
RF_HOST_DEVICE constexpr int64_t halo_rows(int64_t pixels, int64_t width) {
  return pixels + 2 * (width + 1);
}
// Of zeros and all windows.
RF_HOST_DEVICE constexpr int64_t halo_bytes(int64_t pixels, int64_t width, int64_t windows) {
  return kHaloZeroBytes + windows * halo_rows(pixels, width) * kHaloRowBytes;
}

// A TileShape whose stages hold filters alone, beside kWindows windows: kHaloWindows, and maybe one
// of what those in use are turned with. The windows' size is a launch's.
template <int kM, int kN, int kWarpsM, int kWarpsN, int kStages_, int kBlocks,
          int kWindows_ = kHaloWindows>
struct HaloShape : TileShape<kM, kN, kWarpsM, kWarpsN, kStages_, kBlocks> {
  static constexpr int kWindows = kWindows_;
  static constexpr int kRightAt = 0;
  static constexpr int kStageBytes = kN * kHaloRowBytes;
  static constexpr int kRingBytes = kStages_ * kStageBytes;
  // Over images of 7 pixels a row, as narrow as those of ResNets become.
  static constexpr int kLeastShared = kRingBytes + static_cast<int>(halo_bytes(kM, 7, kWindows_));
  static_assert(kHaloRowBytes ==
                TileShape<kM, kN, kWarpsM, kWarpsN, kStages_, kBlocks>::kStepBytes);
};

// Windows of a tile; 0: its pixels come tap by tap.
template <class Shape>
constexpr int kWindowsOf = 0;
template <class Shape>
  requires(Shape::kWindows > 0)
constexpr int kWindowsOf<Shape> = Shape::kWindows;

// Of a block that puts its results together in fp32, where filters and windows lay.
RF_HOST_DEVICE constexpr int64_t halo_staged_bytes(int64_t ring, int64_t pixels, int64_t columns,
                                                   int64_t width, int64_t windows) {
  const int64_t operands = ring + halo_bytes(pixels, width, windows);
  const int64_t results = pixels * columns * int64_t{sizeof(float)};
  return operands < results ? results : operands;
}

}  // namespace resnet_fused
