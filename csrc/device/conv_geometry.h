// What the convolutions' kernels are told: sizes, strides, and the walk over the reduction. Plain
// values, which a launch computes on the host.
#pragma once

#include <cstdint>

#include "divide.h"
#include "portable.h"

namespace resnet_fused {

// Along each axis: a kernel keeps a bit for each.
constexpr int kMostTaps = 15;

// The reduction of one group: element e is channel c of tap (r, s), e = (r * taps_s + s) * channels
// + c. Counting through the taps wastes nothing on channels that fill no step.
struct Reduction {
  int32_t channels;
  int32_t taps_s;
  int32_t taps_r;
};

// A place in the reduction, or the distance of two.
struct Column {
  int32_t c;
  int32_t s;
  int32_t r;
};

RF_HOST_DEVICE Column column_of(int32_t element, const Reduction& reduction) {
  const int32_t tap = element / reduction.channels;
  return Column{element - tap * reduction.channels, tap % reduction.taps_s, tap / reduction.taps_s};
}

// `at` + `by`, without a division: each digit carries at most one.
RF_HOST_DEVICE Column advanced(Column at, const Column& by, const Reduction& reduction) {
  at.c += by.c;
  at.s += by.s;
  at.r += by.r;
  if (at.c >= reduction.channels) {
    at.c -= reduction.channels;
    ++at.s;
  }
  if (at.s >= reduction.taps_s) {
    at.s -= reduction.taps_s;
    ++at.r;
  }
  return at;
}

// How an operand lies in memory along the reduction: elements from one channel, or tap, to the
// next.
struct ColumnStrides {
  int64_t c;
  int64_t s;
  int64_t r;
};

RF_HOST_DEVICE int64_t offset_of(const Column& at, const ColumnStrides& strides) {
  return at.c * strides.c + at.s * strides.s + at.r * strides.r;
}

// An image that is gathered: where the first tap of pixel (p, q) lies, and how far taps are apart.
struct ImageGather {
  int32_t height;
  int32_t width;
  int32_t stride_h;  // of neighbouring output pixels
  int32_t stride_w;
  int32_t origin_h;  // of pixel (0, 0)'s first tap: minus the padding
  int32_t origin_w;
  int32_t step_h;  // of neighbouring taps: the dilation
  int32_t step_w;
  int64_t group_stride;  // elements, from one group's channels to the next one's
  int64_t image_stride;  // 16 bytes where the operands are read wide, else elements; so below
  int64_t row_stride;
  int64_t pixel_stride;
  ColumnStrides columns;  // along the reduction
};

// A tensor [N, K, P, Q] in any layout, in elements.
struct PixelStrides {
  int64_t n;
  int64_t k;
  int64_t p;
  int64_t q;
};

// Output pixels m = (n * P + p) * Q + q.
struct PixelGrid {
  int32_t pixels;   // N P Q, below 2^31: a launch cuts larger batches
  Divisor columns;  // Q
  Divisor rows;     // P
};

struct Pixel {
  int32_t n;
  int32_t p;
  int32_t q;
};

// m: at most the grid's pixels.
RF_HOST_DEVICE Pixel pixel_of(int32_t m, const PixelGrid& grid) {
  const uint32_t row = quotient(static_cast<uint32_t>(m), grid.columns);
  const uint32_t image = quotient(row, grid.rows);
  return Pixel{static_cast<int32_t>(image), static_cast<int32_t>(row - image * grid.rows.value),
               static_cast<int32_t>(static_cast<uint32_t>(m) - row * grid.columns.value)};
}

// Whether position m of a walk over an output with a column behind each row and a row behind each
// image, that of `at`, is a pixel.
RF_HOST_DEVICE bool is_pixel(const Pixel& at, int32_t m, const PixelGrid& walk) {
  return at.q + 1 < static_cast<int32_t>(walk.columns.value) &&
         at.p + 1 < static_cast<int32_t>(walk.rows.value) && m < walk.pixels;
}

RF_HOST_DEVICE int64_t offset_of(const Pixel& at, const PixelStrides& strides) {
  return at.n * strides.n + at.p * strides.p + at.q * strides.q;
}

// Which part of the product a block computes. Rows of tiles go in bands of kTileBand, walked column
// by column, so that the blocks that run at one time share rows and weights in L2; the splits of a
// tile follow each other.
struct TileGrid {
  int32_t tiles_m;
  int32_t tiles_n;  // of one group
  int32_t groups;
  int32_t splits;
};

struct Tile {
  int32_t m;
  int32_t n;
  int32_t group;
  int32_t split;
  uint32_t index;  // of the tile, without its splits
};

constexpr uint32_t kTileBand = 8;

RF_HOST_DEVICE Tile tile_of(uint32_t block, const TileGrid& grid) {
  const auto splits = static_cast<uint32_t>(grid.splits);
  const auto tiles_m = static_cast<uint32_t>(grid.tiles_m);
  const auto tiles_n = static_cast<uint32_t>(grid.tiles_n);
  const uint32_t index = block / splits;
  const uint32_t of_group = tiles_m * tiles_n;
  const uint32_t group = index / of_group;
  const uint32_t inside = index - group * of_group;
  const uint32_t band = inside / (kTileBand * tiles_n);
  const uint32_t first = band * kTileBand;
  const uint32_t rows = tiles_m - first < kTileBand ? tiles_m - first : kTileBand;
  const uint32_t rest = inside - first * tiles_n;
  return Tile{static_cast<int32_t>(first + rest % rows), static_cast<int32_t>(rest / rows),
              static_cast<int32_t>(group), static_cast<int32_t>(block - index * splits), index};
}

// What a forward convolution reads, and how: gathered pixels [M][reduction] on the left, filters
// [N][reduction] on the right.
struct ConvOperands {
  const void* x;       // [N, C, H, W] in `image`'s strides
  const void* weight;  // [K, C / groups, R, S] in the filters' strides
  ImageGather image;
  ColumnStrides filter_columns;  // in the units of ImageGather
  int64_t filter_stride;         // from one output channel to the next
  int32_t filters;               // output channels of a group
  PixelGrid grid;
  Reduction reduction;
  Column advance;  // LoadPattern::kAdvance elements of the reduction
  Column next;     // one element
};

// What becomes of the sums.
struct ConvOutput {
  void* out;             // [N, K, P, Q] in `out_strides`
  const void* residual;  // likewise; null: none
  const float* scale;    // [K]
  const float* shift;    // [K]
  PixelStrides out_strides;
  PixelStrides residual_strides;
  int32_t channels;          // of one group
  float floor;               // 0 for a ReLU, -infinity for none
  bool wide_out;             // 16 bytes at a time: adjacent channels, all aligned
  bool wide_residual;        // likewise
  bool pixels_lie_together;  // element by element: neighbouring threads take neighbouring pixels
};

// Where the parts of split sums meet.
struct SplitWorkspace {
  float* partial;      // [tile][split][vector of a thread's sums][thread][4]
  uint32_t* arrivals;  // [tile], zero before the kernel, and again behind it
  bool zero;           // they are so already: nothing has to clear them
};

struct ConvBnActArguments {
  ConvOperands operands;
  int32_t steps;       // of the whole reduction
  int32_t steps_each;  // of a split; the last one may have fewer, and has one at least
  TileGrid tiles;
  SplitWorkspace workspace;  // unused without splits
  ConvOutput output;
  int64_t prefetch_bytes;  // of the weights, that are asked for before the wait
  bool reverse;            // tiles are walked from the last one
  bool dependent;          // the next kernel may begin early
  bool follows;            // this one may: for the launch, the kernel waits either way
};

}  // namespace resnet_fused
