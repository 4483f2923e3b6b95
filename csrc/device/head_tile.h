// What a launch of the head says, and the shapes of its product's tiles.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int kHeadMeanThreads = 256;
constexpr int kHeadChannels = 64;  // that a warp pools: 128 bytes of a pixel in channels_last
// Elements of the reduction that a warp multiplies at a time: 16 bytes of each row a lane.
constexpr int kHeadStep = 32;

struct HeadArguments {
  const void* x;       // [N, C, H, W]
  const void* weight;  // [classes, C]
  const void* bias;    // [classes], or null
  void* mean;          // [N, pitch], 16-byte aligned; zeros behind the last channel
  void* out;           // [N, classes], contiguous
  int32_t images;
  int32_t channels;
  int32_t pixels;  // of an image
  int32_t width;
  int32_t classes;
  int32_t pitch;           // a multiple of kHeadChannels
  int32_t wide_weight;     // eight channels can be read at once
  bool dependent;          // the next kernel may begin early
  bool follows;            // the first one may: for the launch, the kernels wait either way
  int64_t prefetch_bytes;  // of the weights, that are asked for before the wait
  int64_t x_n, x_c, x_h, x_w;
  int64_t w_k, w_c;
};

// Tiles of kTilesM x 16 images and kTilesN x 8 classes; the reduction goes round the kWarps warps.
template <int kTilesM_, int kTilesN_, int kWarps_>
struct HeadShape {
  static constexpr int kTilesM = kTilesM_;
  static constexpr int kTilesN = kTilesN_;
  static constexpr int kWarps = kWarps_;
  // That are to share a multiprocessor. One class tile leaves room for two; asked for more, ptxas
  // runs out of registers with the wider ones.
  static constexpr int kBlocks = kTilesN == 1 ? 2 : 1;
  static constexpr int kM = 16 * kTilesM;
  static constexpr int kN = 8 * kTilesN;
  static constexpr int kThreads = 32 * kWarps;
  // Floats of a row of a warp's sums: four rows of pairs, side by side in a line of banks.
  static constexpr int kPitch = kN + (kN > 8 ? 8 : 0);
  static constexpr int kPartBytes = kM * kPitch * 4;
  static constexpr int kSharedBytes = kWarps * kPartBytes;

  static_assert(kPitch * 4 % 64 == 32, "rows of sums fall into the same banks");
};

}  // namespace resnet_fused
