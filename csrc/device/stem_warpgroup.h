// The shape of the stem's tiles for sm_90a, what lies where in the shared memory of a block, and
// the way through its part of the images. Numbers alone: the launches know it as well.
//
// Filters are the left side of the product, 64 rows; columns of the convolution the right one. A
// row of taps is two instructions deep: chunks 0 and 1 of a column's window, then 2 and 3. Chunk j
// of column e's window is chunk e + j of the image's row (stem_tile.h), so that without a swizzle
//
//   the next column, a row of a core matrix, lies 16 bytes further, as it must;
//   the next eight columns 128 bytes (`stride`);
//   the second half of K 16 bytes, where the next column begins as well (`leading`).
//
// Core matrices overlap. PTX ISA, Matrix Descriptor Format, asks of the distances only that they
// are multiples of 16; that the hardware reads what they say is not yet seen: tools/conformance.py
// asks ("overlapping halves of K").
//
// 0 * Inf is NaN, so the eighth tap wants a zero for a pixel as well, and nothing masks what wgmma
// reads. A second copy of each chunk has one: the last chunk of a window is read there.
//
// A worker is a consuming warpgroup and two warps of the producing one, with a ring of rows of
// their own; they walk down a strip. The sums of a row of the convolution stay in registers, and
// those of the next one are made meanwhile. For 224x224 images a tile is their width: no column is
// computed twice, and of rows the one above a strip alone. Shared memory of a block then:
//
//   filters 28 KB, rings 2 x 8 pairs x 2 rows x 2 copies x 115 chunks = 115 KB, staging 16 KB
//
// (A block that makes 4 pooled rows by 28 columns at a time would take 153 KB, compute 1.15 times
// the columns and rows, and pass the convolution's rows through shared memory.)
#pragma once

#include <cstdint>

#include "stem_tile.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

constexpr int kStemProducerWarps = 2;  // of a worker
constexpr int kStemProducerThreads = 32 * kStemProducerWarps;
static_assert(kStemFilters == kWarpgroupRows);
static_assert(kConsumers * kStemProducerThreads == kWarpgroupThreads);
constexpr int kStemPairsInUse = 4;  // of the image's rows, that a row of the convolution reads
// A producing thread has its chunks of three rows of the image on their way in registers, a
// consuming one the sums of two rows of the convolution.
constexpr int kStemProducerRegisters = 104;
constexpr int kStemConsumerRegisters = 200;

// kColumns_ columns of the convolution in a tile.
template <int kColumns_>
struct StemWarpgroupShape {
  static constexpr int kThreads = kWarpgroupBlockThreads;
  static constexpr int kColumns = kColumns_;
  static constexpr int kPooled = kColumns / 2;  // one fewer behind the first tile
  static constexpr int kWords = kColumns / 16;  // of two pooled columns that a thread has
  static constexpr int kChunks = kColumns + kStemWindowChunks - 1;  // of a row of the image
  static_assert(kColumns % 16 == 0 && kColumns <= 128, "two rows of sums in registers");

  // Chunks of a row that a producing thread brings: `thread` and those 64 further each.
  static constexpr int kUnits = (kChunks + kStemProducerThreads - 1) / kStemProducerThreads;
  static constexpr int kTailsAt = kChunks * kChunkBytes;  // the second copies, in a row
  static constexpr int kRowBytes = 2 * kTailsAt;
  static constexpr int kPairBytes = 2 * kRowBytes;
  // The last row of a strip has its pairs in use, and so has the first row of the next strip.
  static constexpr int kPairs = 2 * kStemPairsInUse;
  static constexpr int kRingBytes = kPairs * kPairBytes;

  // Filters: two taps of all 64 are core matrices one behind the other. The pitch lets eight
  // neighbouring chunks of a filter lie in different banks.
  static constexpr int kChunkPitch = kStemFilters * kChunkBytes + kChunkBytes;
  static constexpr int kFiltersBytes = kStemTaps * kStemWindowChunks * kChunkPitch;

  // A warp's pooled row on its way out, 16 filters of each pixel; two words fill 16 pixels.
  static constexpr int kStagedPixels = (kWords + 1) / 2 * 16;
  static constexpr int kPixelBytes = 32;
  static constexpr int kStagingBytes = kStagedPixels * kPixelBytes;

  // scale [64], shift [64], input_norm [2][4]; filters; each worker's ring; each consuming warp's
  // staging; each worker's barriers.
  static constexpr int kScaleBytes = kStemFilters * 4;
  static constexpr int kFiltersAt = 2 * kScaleBytes + 128;
  static constexpr int kRingAt = kFiltersAt + kFiltersBytes;
  static constexpr int kStagingAt = kRingAt + kConsumers * kRingBytes;
  static constexpr int kBarriersAt = kStagingAt + kConsumers * kWarpgroupWarps * kStagingBytes;
  static constexpr int kBarriersBytes = ring_bytes(kPairs);
  static constexpr int kSharedBytes = kBarriersAt + kConsumers * kBarriersBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);

  // The filter at a place of the order in which they are brought: of two that a warp brings at
  // once, four rows apart, no two words share a bank.
  static RF_HOST_DEVICE uint32_t filter_at(uint32_t place) {
    return place / 8 * 8 + place % 2 * 4 + place % 8 / 2;
  }
  static RF_HOST_DEVICE uint32_t filter_place(uint32_t place, uint32_t row, uint32_t chunk) {
    return (row * kStemWindowChunks + chunk) * kChunkPitch + filter_at(place) * kChunkBytes;
  }

  // Tiles side by side: the columns of one overlap those of the next by two, a pooled column.
  static RF_HOST_DEVICE int64_t tiles(int64_t out_width) {
    return out_width <= kPooled ? 1 : (out_width - 1 + kPooled - 2) / (kPooled - 1);
  }
};

// What a worker makes at a time: rows of the convolution from one row and column on, and the pooled
// rows that they end.
struct StemStrip {
  int32_t n;
  int32_t column;
  int32_t row;
  int32_t rows;
  int32_t first_pooled;

  static RF_HOST_DEVICE StemStrip of(int32_t item, const StemArguments& arguments,
                                     int32_t columns) {
    const StemItem made = StemItem::of(item, arguments, columns - 2);
    // The row above a strip belongs to its first pooled row. Those beyond an image are its padding.
    const int32_t row = made.first_row > 0 ? 2 * made.first_row - 1 : 0;
    const int32_t end = 2 * made.end_row;
    return StemStrip{made.n, made.first_column, row,
                     (end < arguments.conv_height ? end : arguments.conv_height) - row,
                     made.first_row};
  }
};

// The strips of a worker, each so many-th one.
class StemStrips {
 public:
  RF_HOST_DEVICE StemStrips(const StemArguments& arguments, int32_t columns, int32_t worker,
                            int32_t workers)
      : arguments_(arguments), columns_(columns), item_(worker), workers_(workers) {}

  RF_HOST_DEVICE bool done() const { return item_ >= arguments_.items; }
  RF_HOST_DEVICE StemStrip strip() const { return StemStrip::of(item_, arguments_, columns_); }
  RF_HOST_DEVICE void next(const StemStrip& /*strip*/) { item_ += workers_; }

 private:
  const StemArguments& arguments_;
  int32_t columns_;
  int32_t item_;
  int32_t workers_;
};

// A worker's steps through its strips: of each `times` as many as it has rows and `more`.
template <class Strips>
class StemSteps {
 public:
  RF_HOST_DEVICE StemSteps(const Strips& strips, int32_t times, int32_t more)
      : strips_(strips), times_(times), more_(more) {
    enter();
  }

  RF_HOST_DEVICE bool done() const { return strips_.done(); }
  RF_HOST_DEVICE const StemStrip& strip() const { return strip_; }
  RF_HOST_DEVICE int32_t step() const { return step_; }
  RF_HOST_DEVICE bool last() const { return step_ + 1 == times_ * (strip_.rows + more_); }
  RF_HOST_DEVICE void next() {
    if (!last()) {
      ++step_;
      return;
    }
    strips_.next(strip_);
    enter();
  }

 private:
  RF_HOST_DEVICE void enter() {
    step_ = 0;
    if (!done()) strip_ = strips_.strip();
  }

  Strips strips_;
  int32_t times_;
  int32_t more_;
  int32_t step_ = 0;
  StemStrip strip_{};
};

using StemWalk = StemSteps<StemStrips>;

}  // namespace resnet_fused
