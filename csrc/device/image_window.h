// The image's rows that a tile of output pixels reads, for a forward convolution of an image of a
// few channels; see image_shape.h for how an image's row lies in shared memory.
//
// A tile is kM output pixels in a row of the grid, and may begin and end within rows of the output.
// Each of its rows of output has a run of chunks, as many as its pixels and kImageTapChunks - 1
// more, and for each row of taps one such line of runs. A run begins kImageGap chunks behind the
// pixels of the one before: by a line of banks, so that eight neighbouring pixels never share one,
// whatever rows they are of.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "image_chunk.h"
#include "image_filters.h"
#include "image_window_shape.h"
#include "operand_tile.h"

namespace resnet_fused {

// Where filters lie: a tile of the product's right side for each row of taps.
template <class Shape>
struct ImageFilterTiles {
  static constexpr int kThreads = Shape::kThreads;
  static_assert(Shape::kStepBytes == KMajor::kRowBytes);

  static RF_DEVICE uint32_t filter_at(uint32_t place) { return place; }
  static RF_DEVICE uint32_t filter_place(uint32_t place, uint32_t row, uint32_t chunk) {
    return row * Shape::kFilterRowBytes + KMajor::offset(place, chunk);
  }
};

RF_DEVICE ImageFilters image_filters(const ConvOperands& operands) {
  return {operands.weight,           operands.filters,          operands.reduction.channels,
          operands.reduction.taps_r, operands.reduction.taps_s, operands.filter_stride,
          operands.filter_columns.c, operands.filter_columns.r, operands.filter_columns.s};
}

// Brings a tile's window, of pixels from `first` on. Each element is asked for once; pixels outside
// of the image are zero.
template <class T, class Shape>
RF_DEVICE void load_image_window(const ImageStatsArguments& arguments, int32_t first,
                                 ptx::SharedAddress window, uint32_t thread) {
  const ConvOperands& operands = arguments.stats.operands;
  const ImageGather& image = operands.image;
  const uint32_t width = operands.grid.columns.value;
  const uint32_t first_row = quotient(static_cast<uint32_t>(first), operands.grid.columns);
  const uint32_t first_column = static_cast<uint32_t>(first) - first_row * width;
  const auto chunks = static_cast<uint32_t>(arguments.chunks);
  ImageOffsets<T> offsets(image.pixel_stride, image.columns.c);
#pragma unroll
  for (int e = 1; e < kImageChunkElements; ++e) {
    ptx::keep(offsets.of[e]);  // or each row works them out anew
  }
#pragma unroll 1
  for (uint32_t i = thread; i < chunks; i += Shape::kThreads) {
    const uint32_t down = quotient(first_column + i, arguments.run);
    const uint32_t column = first_column + i - down * arguments.run.value;
    const uint32_t row = first_row + down;
    const uint32_t n = quotient(row, operands.grid.rows);
    const auto p = static_cast<int32_t>(row - n * operands.grid.rows.value);
    const int32_t h0 = p * image.stride_h + image.origin_h;
    const int32_t w0 = kImageStride * static_cast<int32_t>(column) + image.origin_w;
    const bool needed = row * width < static_cast<uint32_t>(operands.grid.pixels) &&
                        column < width + (kImageTapChunks - 1);
    const T* from = static_cast<const T*>(operands.x) + n * image.image_stride +
                    h0 * image.row_stride + w0 * image.pixel_stride;
    const uint32_t inside = image_elements(operands.reduction.channels, [&](int pixel) {
      return needed && static_cast<uint32_t>(w0 + pixel) < static_cast<uint32_t>(image.width);
    });
    ImageChunk<T> rows[kImageTapRows];
#pragma unroll
    for (int r = 0; r < kImageTapRows; ++r) {
      const bool in_rows =
          r < operands.reduction.taps_r &&
          static_cast<uint32_t>(h0 + r * image.step_h) < static_cast<uint32_t>(image.height);
      rows[r].issue(from, offsets, in_rows ? inside : 0u);
      from += image.columns.r;
    }
#pragma unroll
    for (int r = 0; r < kImageTapRows; ++r) {
      if (r >= operands.reduction.taps_r) break;
      ptx::store_shared(window + (static_cast<uint32_t>(r) * chunks + i) * kChunkBytes,
                        rows[r].words());
    }
  }
}

// Fragments of a warp's rows, as KMajorFragments has those of a left side: a pixel's row of taps
// begins with its chunk. Taps that the filter has not become zeros, since zero times what the image
// has there may be NaN.
template <class Shape>
class ImageWindowFragments {
 public:
  // tile: its first pixel; first: the warp's first row within the tile.
  RF_DEVICE ImageWindowFragments(const ConvOperands& operands, int32_t tile, uint32_t first,
                                 uint32_t lane) {
    const Divisor& width = operands.grid.columns;
    const auto pixel = static_cast<uint32_t>(tile);
    const uint32_t column = pixel - quotient(pixel, width) * width.value;
    const uint32_t matrix = lane / 8;
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      const uint32_t row = first + i * 16 + matrix % 2 * 8 + lane % 8;
      const uint32_t chunk = row + quotient(column + row, width) * kImageGap + matrix / 2;
      places_[i] = chunk * kChunkBytes;
    }
    taps_ = operands.reduction.taps_s - static_cast<int32_t>(lane % 4 / 2);
  }

  RF_DEVICE void load(uint32_t (&fragments)[Shape::kBlocksM][4], ptx::SharedAddress rows,
                      int slice) const {
    constexpr int kSliceTaps = kImageTaps / Shape::kSlices;
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
      ptx::ldmatrix_x4(fragments[i], rows + places_[i] + slice * kSliceBytes);
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // the lane's pair of channels is of this tap or the next one
        const int tap = slice * kSliceTaps + e / 2 * kImageChunkPixels;
        if (tap >= taps_) fragments[i][e] = 0;
      }
    }
  }

 private:
  uint32_t places_[Shape::kBlocksM];
  int32_t taps_;  // of the lane's parity: those below this one count
};

}  // namespace resnet_fused
