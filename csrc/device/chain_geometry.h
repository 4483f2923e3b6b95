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
// are in flight or in use, and kNext channels of `next` are added up in registers.
template <int kM_, int kNext_, int kWarps_, int kStages_, int kBlocks_>
struct ChainShape : TileShape<kM_, kChainStep, kWarps_, 1, kStages_, kBlocks_> {
  static_assert(ChainShape::kStepBytes == kChainStepBytes);
  static constexpr int kNext = kNext_;

  // The second product: as many rows, and a step of the reduction for each step of `out`.
  struct Next {
    static constexpr int kBlocksM = ChainShape::kBlocksM;
    static constexpr int kBlocksN = kNext_ / 16;
    static constexpr int kSlices = ChainShape::kSlices;
  };
  static constexpr int kRows = ChainShape::kWarpM / 8;  // that a thread moves 16 bytes of
  static_assert(kNext_ % 16 == 0);
};

// Bytes of a tile [rows][a step of the reduction].
template <int kRows>
constexpr int kSlabBytes = kRows * kChainStepBytes;

// Scale and shift of `out`, scale and shift of the projection, for a step of channels.
constexpr int kChainVectors = 4;

// Shared memory of a block, in this order: the pixels' rows, of what the first convolution reads
// and of what the shortcut projects; the ring; and tiles of `out`, one in each stage where the
// shortcut comes there, else one alone.
struct ChainMemory {
  int32_t rows;      // bytes in front of the ring
  int32_t stage;     // bytes of the weights and vectors of a step
  int32_t tile;      // bytes from one stage's tile of `out` to the next one's; 0: there is one
  int32_t tiles_at;  // bytes in front of them
  int32_t bytes;     // in all

  // m, next, stages: of the shape. slabs: steps of both left sides' reductions.
  static ChainMemory of(int m, int next, int stages, int slabs, bool shortcut) {
    ChainMemory made{};
    made.rows = slabs * m * kSlabBytes<1>;
    made.stage =
        slabs * kSlabBytes<kChainStep> + next * kSlabBytes<1> + kChainVectors * kChainStep * 4;
    made.tile = shortcut ? m * kSlabBytes<1> : 0;
    made.tiles_at = made.rows + stages * made.stage;
    made.bytes = made.tiles_at + (shortcut ? stages : 1) * m * kSlabBytes<1>;
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

// The filters of a 1x1 convolution [K][C], with their scale and shift.
struct ChainFilters {
  const void* data;
  const float* scale;
  const float* shift;
  int32_t stride;  // 16 bytes, from one filter to the next
  int32_t filters;
  int32_t units;  // 16 bytes of a filter
};

struct ConvChainArguments {
  ChainImage x;
  ChainImage residual;   // data is null where the shortcut is projected
  ChainImage projected;  // units is 0 where it is not
  ChainFilters weight;
  ChainFilters projection;
  ChainFilters next;  // filters is 0 without
  ChainResult out;
  ChainResult following;
  PixelGrid grid;
  ChainMemory memory;
  int32_t x_slabs;  // steps of the first convolution's reduction
  int32_t projected_slabs;
  int32_t steps;      // of out's channels
  int32_t out_shift;  // 1 where only the even rows and columns of out are stored
  bool reverse;       // the last tile comes first
};

}  // namespace resnet_fused
