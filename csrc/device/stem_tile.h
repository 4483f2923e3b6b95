// What a launch of the stem says, and how its tiles lie in shared memory.
//
// A pixel of the image has four channels there, absent ones zero: two pixels are a chunk of 16
// bytes. A filter's row is seven taps, and an eighth that counts for nothing: 32 elements of the
// reduction, four chunks, two matrix instructions deep. With stride 2 the next column of the
// convolution begins one chunk later, so chunk e + j of the image's row is chunk j of column e's
// window: the matrix that the product reads needs no copy.
//
// A warp's 16 rows of that matrix are the even and the odd columns of eight pooled pixels. So
// chunks of even number lie apart from odd ones, and eight neighbours of a kind have a line of
// banks of their own. The first of the eight pixels is there for its odd column alone, the left
// neighbour of the second one's window.
#pragma once

#include <cstdint>

#include "image_shape.h"
#include "portable.h"
#include "tile_shape.h"

namespace resnet_fused {

constexpr int kStemTaps = kImageTapRows;       // rows and columns of a filter
constexpr int kStemChannels = kImageChannels;  // of a pixel in shared memory
constexpr int kStemStride = kImageStride;
constexpr int kStemFilters = 64;      // of a block
constexpr int kStemWarpFilters = 32;  // of a warp: their weights stay in its registers
constexpr int kStemPooled = 7;        // pooled pixels that 16 columns make
constexpr int kStemWindowChunks = kImageTapChunks;  // of a filter's row

// What the image's elements are.
enum class StemImage : int32_t { kBytes = 0, kFloat = 1, kWeights = 2 };

struct StemArguments {
  const void* x;       // [N, C, H, W]
  const void* weight;  // [K, C, 7, 7]
  const float* scale;  // [K]
  const float* shift;  // [K]
  const float* norm;   // [2, C], or null
  void* out;           // [N, K, P', Q']
  StemImage image;
  int32_t channels;
  int32_t height;
  int32_t width;
  int32_t filters;
  int32_t padding_h;
  int32_t padding_w;
  int32_t conv_height;
  int32_t conv_width;
  int32_t out_height;
  int32_t out_width;
  int32_t tiles;     // along a row of the pooled image
  int32_t strips;    // along a column,
  int32_t rows;      // of so many pooled rows
  int32_t items;     // images x strips x tiles
  int32_t wide_out;  // eight filters of a pixel can be stored at once
  bool dependent;    // the next kernel may begin early
  bool follows;      // this one may: for the launch, the kernel waits either way
  bool quantised;    // out is e4m3, for the launch as well
  float out_factor;  // scale and shift are multiplied by it
  int64_t x_n, x_c, x_h, x_w;
  int64_t w_k, w_c, w_r, w_s;
  int64_t out_n, out_c, out_h, out_w;
};

// kColumnWarps warps side by side, each with kTiles times 16 columns; twice, 32 filters each.
// kBlocks blocks are to share a multiprocessor.
template <int kColumnWarps_, int kTiles_, int kBlocks_>
struct StemShape {
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kColumnWarps * (kStemFilters / kStemWarpFilters);
  static constexpr int kPooled = kStemPooled * kColumnWarps * kTiles;  // columns of a block
  // Columns of the convolution, from the one before the first pixel's left neighbour on.
  static constexpr int kColumns = 2 * kPooled + 2;
  static constexpr int kChunks = kColumns + kStemWindowChunks - 1;  // of a row of the image

  // The image's rows come in pairs: what the convolution's next row needs anew. A ring of eight
  // pairs holds the four in use and the one that arrives.
  static constexpr int kSlots = kThreads / 2;  // chunks that a row has room for, one a thread
  static constexpr int kRowBytes = kSlots * kChunkBytes;
  static constexpr int kPairs = 8;
  static constexpr int kPairsInUse = 4;
  static constexpr int kRingBytes = kPairs * 2 * kRowBytes;

  // Before the ring is filled the filters pass through its place.
  static constexpr int kFilterBytes = kStemTaps * kStemWindowChunks * kChunkBytes;
  static constexpr int kFiltersBytes = kStemFilters * kFilterBytes;
  // scale [64], shift [64], input_norm [2][4].
  static constexpr int kScaleBytes = kStemFilters * 4;
  static constexpr int kHeadBytes = 2 * kScaleBytes + 128;
  static constexpr int kSharedBytes =
      kHeadBytes + (kRingBytes > kFiltersBytes ? kRingBytes : kFiltersBytes);

  static_assert(kChunks <= kSlots);

  // Which of a block's filters comes at a place of their order in shared memory. A lane's results
  // are two columns of each of four instructions: those eight are neighbouring filters.
  static RF_HOST_DEVICE uint32_t filter_at(uint32_t place) {
    const uint32_t column = place % 8;
    return place / kStemWarpFilters * kStemWarpFilters + column / 2 * 8 +
           place % kStemWarpFilters / 8 * 2 + column % 2;
  }

  // Where a chunk of a filter's row lies within it. Filters are 28 chunks long, so that those of
  // even place begin in the same banks; this way eight in a row have a line of banks.
  static RF_HOST_DEVICE uint32_t filter_chunk(uint32_t place, uint32_t chunk) {
    return (chunk ^ place / 2 % kStemWindowChunks) * kChunkBytes;
  }

  // Where a chunk of a row of taps lies, of the filter at a place.
  static RF_HOST_DEVICE uint32_t filter_place(uint32_t place, uint32_t row, uint32_t chunk) {
    return place * kFilterBytes + row * (kStemWindowChunks * kChunkBytes) +
           filter_chunk(place, chunk);
  }

  // Where a chunk of the image's row lies.
  static RF_HOST_DEVICE uint32_t chunk_place(uint32_t chunk) {
    const uint32_t odd = chunk % 2;
    // Eight chunks in a row are stored at once: four of a kind each, in different banks.
    return (odd * (kSlots / 2) + (chunk / 2 ^ odd * 4)) * kChunkBytes;
  }
};

// The part of the pooled image that a block makes at a time.
struct StemItem {
  int32_t n;
  int32_t first_column;  // pooled
  int32_t first_row;     // pooled
  int32_t end_row;

  static RF_HOST_DEVICE StemItem of(int32_t item, const StemArguments& arguments, int32_t pooled) {
    const int32_t segment = item / arguments.tiles;
    const int32_t first = segment % arguments.strips * arguments.rows;
    const int32_t end = first + arguments.rows;
    return StemItem{segment / arguments.strips, item % arguments.tiles * pooled, first,
                    end < arguments.out_height ? end : arguments.out_height};
  }
};

}  // namespace resnet_fused
