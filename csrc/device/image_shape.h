// How a step of a gradient of the first layer's weights lies in shared memory.
//
// An image has few channels, so that no 16 bytes of it belong to one tap: read as any operand, each
// of its elements is asked for once a tap. Here a step is 32 output pixels of one row, and the
// image lies in shared memory as the rows that their taps read, four channels a pixel, absent ones
// zero: two pixels are a chunk of 16 bytes, two taps wide. With stride 2 the next output pixel
// begins one chunk later, so that chunk e + j of a row is chunk j of pixel e's taps: eight
// neighbours are a line of banks, and the matrix that the product reads needs no copy (as in
// stem_tile.h).
//
// The product's columns are rows of taps, taps and channels, room for 7 x 8 x 4 of them. Those that
// the filter has not come to nothing that is stored.
#pragma once

#include <cstdint>

#include "portable.h"
#include "tile_shape.h"

namespace resnet_fused {

constexpr int kImageTapRows = 7;
constexpr int kImageTaps = 8;  // of a row
constexpr int kImageChannels = 4;
constexpr int kImageStride = 2;                                   // along a row
constexpr int kImagePixels = 32;                                  // of a step
constexpr int kImageTapChunks = kImageTaps * kImageChannels / 8;  // of a row of taps
// Of a row: what the last pixel's taps end at, and one that no tap reads. Of the first row it says
// how many output pixels there are.
constexpr int kImageSpare = kImagePixels + kImageTapChunks - 1;
constexpr int kImageRowBytes = (kImageSpare + 1) * kChunkBytes;
constexpr int kImageChunks = kImageTapRows * (kImageSpare + 1);
constexpr int kImageCountAt = kImageSpare * kChunkBytes;
// What is read in the place of output pixels that are not there: a line of banks.
constexpr int kImageZeroBytes = 8 * kChunkBytes;

// The tile of dy and y's, then the image's rows; zeros behind the stages. For types of 16 bits.
template <int kM_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct ImageShape : TileShape<kM_, kImageTapRows * kImageTaps * kImageChannels, kWarpsM_, kWarpsN_,
                              kStages_, kBlocks_> {
  using Base = TileShape<kM_, kImageTapRows * kImageTaps * kImageChannels, kWarpsM_, kWarpsN_,
                         kStages_, kBlocks_>;
  static_assert(Base::kStepBytes == 2 * kImagePixels);

  static constexpr int kMaskOffset = kM_ * Base::kStepBytes;
  static constexpr int kRightAt = 2 * kMaskOffset;
  static constexpr int kRowsBytes =
      (kImageChunks * kChunkBytes + kImageZeroBytes - 1) / kImageZeroBytes * kImageZeroBytes;
  static constexpr int kStageBytes = kRightAt + kRowsBytes;
  static constexpr int kZerosAt = kStages_ * kStageBytes;
  static constexpr int kRingBytes = kZerosAt + kImageZeroBytes;
};

}  // namespace resnet_fused
