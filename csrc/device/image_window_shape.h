// Tiles of a forward convolution of an image of a few channels, which lies in shared memory as the
// rows that a tile's taps read; see image_window.h.
#pragma once

#include <cstdint>

#include "image_shape.h"
#include "portable.h"
#include "stats_geometry.h"
#include "tile_shape.h"

namespace resnet_fused {

// Chunks from the last pixel of a row of output to the first of the next: a line of banks.
constexpr int kImageGap = 8;
static_assert(kImageGap >= kImageTapChunks - 1);

// All rows of taps are stages: they are asked for at once. Behind the filters, which stay for all
// tiles of a block, lies a tile's window, and in its place the tile's results. For types of 16
// bits.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kBlocks_>
struct ImageWindowShape : TileShape<kM_, kN_, kWarpsM_, kWarpsN_, kImageTapRows, kBlocks_> {
  using Base = TileShape<kM_, kN_, kWarpsM_, kWarpsN_, kImageTapRows, kBlocks_>;
  static_assert(Base::kStepBytes == kImageTapChunks * kChunkBytes);

  static constexpr int kFilterRowBytes = kN_ * Base::kStepBytes;  // of one row of taps
  static constexpr int kFiltersBytes = kImageTapRows * kFilterRowBytes;
  static constexpr int kRingBytes = kM_ * kN_ * 2;  // of the results
  static constexpr int kLeastShared = kFiltersBytes + kRingBytes;
};

// Chunks of a row of taps, of a tile of so many pixels: as many as one needs that begins with the
// last pixel of a row of output of `width`.
RF_HOST_DEVICE constexpr int64_t image_window_chunks(int64_t pixels, int64_t width) {
  return pixels + (width + pixels - 2) / width * kImageGap + kImageTapChunks - 1;
}

// Shared memory of a block: filters, and either a window or what the results are put together in.
RF_HOST_DEVICE constexpr int64_t image_block_bytes(int64_t filters, int64_t results, int64_t rows,
                                                   int64_t chunks) {
  const int64_t window = rows * chunks * kChunkBytes;
  return filters + (window < results ? results : window);
}

struct ImageStatsArguments {
  ConvBnStatsArguments stats;  // groups and splits: one
  Divisor run;                 // chunks from a row of output to the next one
  int32_t chunks;              // of a row of taps
};

}  // namespace resnet_fused
