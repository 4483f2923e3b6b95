// What the kernel of a chain of convolutions is told, its tiles, and its shared memory. Plain
// values, which a launch computes on the host.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "tile_shape.h"

namespace resnet_fused {

// Channels of 16 bits that make a step of a reduction, and their bytes in a row of a tile.
constexpr int kChainStep = 32;
constexpr int kChainStepBytes = 2 * kChainStep;

// A tile of kM pixels by kWarps warps, each with whole rows of it: what a warp has made of `out` is
// then all that it multiplies on. `out` is made a step's width of channels at a time, kStages steps
// are in flight or in use, and kNext channels of `next` are added up in registers. kFront: 0, or
// how many channels a 3x3 convolution in front may make, which are added up likewise before.
template <int kM_, int kNext_, int kWarps_, int kStages_, int kBlocks_, int kFront_ = 0>
struct ChainShape : TileShape<kM_, kChainStep, kWarps_, 1, kStages_, kBlocks_> {
  static_assert(ChainShape::kStepBytes == kChainStepBytes);
  static constexpr int kNext = kNext_;
  static constexpr int kFront = kFront_;

  // A product of the tile's rows and kColumns others.
  template <int kColumns>
  struct Product {
    static constexpr int kBlocksM = ChainShape::kBlocksM;
    static constexpr int kBlocksN = kColumns / 16;
    static constexpr int kSlices = ChainShape::kSlices;
  };
  // The second one: a step of the reduction for each step of `out`.
  using Next = Product<kNext_>;
  // The one in front: a step of the reduction for each tap and 32 channels of x.
  using Front = Product<kFront_>;
  static constexpr int kRows = ChainShape::kWarpM / 8;  // that a thread moves 16 bytes of
  static_assert(kNext_ % 16 == 0 && kFront_ % 16 == 0);
};

// Bytes of a tile [rows][a step of the reduction].
template <int kRows>
constexpr int kSlabBytes = kRows * kChainStepBytes;

// Scale and shift of `out`, scale and shift of the projection, for a step of channels.
constexpr int kChainVectors = 4;

// A side of the filter in front. A step of the ring holds the filters of a row of its taps.
constexpr int kFrontTaps = 3;
// What taps outside of the image are read from: as many bytes as shared memory has banks for, so
// that each finds its own bank there.
constexpr int kZeroBytes = 128;

// What the shared memory of a block depends on, beside its shape. Slabs: steps of a reduction.
struct ChainSizes {
  int32_t x_slabs;  // of the first 1x1 convolution
  int32_t projected_slabs;
  int32_t front_slabs;  // of a tap of the convolution in front; 0: there is none
  int32_t width;        // pixels of a row of the image
  bool shortcut;        // comes as a tensor
};

// Shared memory of a block, in this order: the pixels' rows, of what the first convolution reads
// and of what the shortcut projects; for a convolution in front zeros, its scale and its shift; the
// ring; and tiles of `out`, one in each stage where the shortcut comes there, else one alone.
//
// With a convolution in front the pixels' rows begin as what it reads, the window: the tile's
// pixels in the order of memory with as many before and behind as a tap may reach, 32 channels at a
// time, the next ones beside those in use. What it makes takes their place.
struct ChainMemory {
  int32_t window;        // bytes of 32 channels of the window
  int32_t projected_at;  // bytes in front of the projected pixels' rows
  int32_t zeros_at;      // likewise of the zeros
  int32_t ring_at;
  int32_t stage;     // bytes from one stage to the next
  int32_t tile;      // bytes from one stage's tile of `out` to the next one's; 0: there is one
  int32_t tiles_at;  // bytes in front of them
  int32_t bytes;     // in all

  // m, next, stages, front: of the shape.
  static ChainMemory of(int m, int next, int stages, int front, const ChainSizes& sizes) {
    ChainMemory made{};
    made.projected_at = sizes.x_slabs * m * kSlabBytes<1>;
    made.ring_at = 0;
    if (sizes.front_slabs > 0) {
      // An even number of rows: whole lines of banks, as everything here.
      made.window = (m + 2 * (sizes.width + 1)) * kSlabBytes<1>;
      const int32_t windows = (sizes.front_slabs > 1 ? 2 : 1) * made.window;
      if (windows > made.projected_at) made.projected_at = windows;
      made.ring_at = kZeroBytes + 2 * front * static_cast<int32_t>(sizeof(float));
    }
    made.zeros_at = made.projected_at + sizes.projected_slabs * m * kSlabBytes<1>;
    made.ring_at += made.zeros_at;
    const int32_t weights = (sizes.x_slabs + sizes.projected_slabs) * kSlabBytes<kChainStep> +
                            next * kSlabBytes<1> + kChainVectors * kChainStep * 4;
    const int32_t tile = m * kSlabBytes<1>;
    made.stage = weights + (sizes.shortcut ? tile : 0);
    if (sizes.front_slabs > 0 && made.stage < kFrontTaps * front * kSlabBytes<1>) {
      made.stage = kFrontTaps * front * kSlabBytes<1>;
    }
    made.tile = sizes.shortcut ? made.stage : 0;
    const int32_t behind = made.ring_at + stages * made.stage;
    made.tiles_at = sizes.shortcut ? made.ring_at + weights : behind;
    made.bytes = sizes.shortcut ? behind : behind + tile;
    return made;
  }
};

// Of a tensor [N, C, H, W], in units of 16 bytes: 31 bits reach over 32 GiB.
struct WideStrides {
  int32_t n;
  int32_t p;
  int32_t q;
};

RF_HOST_DEVICE int32_t offset_of(const Pixel& at, const WideStrides& strides) {
  return at.n * strides.n + at.p * strides.p + at.q * strides.q;
}

// Channels of pixels that are read 16 bytes at a time; pixel (n, p, q) is one of `out`.
struct ChainImage {
  const void* data;
  WideStrides strides;
  int32_t units;  // 16 bytes of channels
};

// Channels of pixels that are written likewise.
struct ChainResult {
  void* data;
  WideStrides strides;
  int32_t units;
};

// The filters of a convolution [K][C], with their scale and shift.
struct ChainFilters {
  const void* data;
  const float* scale;
  const float* shift;
  int32_t stride;  // 16 bytes, from one filter to the next
  int32_t filters;
  int32_t units;           // 16 bytes of a filter, of one tap
  int32_t row;             // 16 bytes, from one row of taps to the next
  int32_t column;          // likewise from one tap
  int64_t prefetch_bytes;  // that are asked for before the wait
};

struct ConvChainArguments {
  ChainImage x;          // what the first convolution reads: the one in front, where there is one
  ChainImage residual;   // data is null where the shortcut is projected
  ChainImage projected;  // units is 0 where it is not
  ChainFilters weight;
  ChainFilters projection;
  ChainFilters next;   // filters is 0 without
  ChainFilters front;  // likewise
  ChainResult out;
  ChainResult following;
  PixelGrid grid;
  ChainMemory memory;
  int32_t x_slabs;  // steps of the first 1x1 convolution's reduction
  int32_t projected_slabs;
  int32_t front_slabs;  // of one tap
  int32_t steps;        // of out's channels
  int32_t out_shift;    // 1 where only the even rows and columns of out are stored
  bool reverse;         // the last tile comes first
  bool dependent;       // the next kernel may begin early
  bool follows;         // this one may: for the launch, the kernel waits either way
};

}  // namespace resnet_fused
