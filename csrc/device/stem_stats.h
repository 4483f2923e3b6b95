// What conv_bn_stats' kernel for a stem on sm_90a is told: the image and its filters as the stem
// has them, y, and how the rows of the convolution are shared out. Plain values, which a launch
// computes on the host.
//
// Each of a block's two workers has a run of rows of tiles that follow one another: those of an
// image's first column of tiles from above, then those of its next one. So no strip has to be cut,
// runs differ by a row at most, and the pixels ahead of one are known by where it begins.
#pragma once

#include <cstdint>

#include "../ptx/tensor_map.h"
#include "portable.h"
#include "stats_geometry.h"
#include "stats_norm.h"
#include "stem_warpgroup.h"

namespace resnet_fused {

// As stem_warpgroup.h's, of which a row of y that goes out, as TMA stores it, takes the place of
// the pooled rows.
template <int kColumns_>
struct StemStatsShape : StemWarpgroupShape<kColumns_> {
  using Base = StemWarpgroupShape<kColumns_>;
  static constexpr int kStagedBytes = Base::kColumns * kStepRowBytes;
  static_assert(kStagedBytes % kTileAlignment == 0);
  static constexpr int kStagingAt =
      (Base::kRingAt + kConsumers * Base::kRingBytes + kTileAlignment - 1) / kTileAlignment *
      kTileAlignment;
  static constexpr int kBarriersAt = kStagingAt + kConsumers * kStagedBytes;
  static constexpr int kSharedBytes = kBarriersAt + kConsumers * Base::kBarriersBytes;
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// Runs of rows, one for each worker: those of all blocks' first workers, then those of the second
// ones. The first runs may have a row more than others.
struct StemRuns {
  int32_t rows;     // of all tiles: images x tiles x height
  int32_t height;   // of the convolution
  int32_t width;    // likewise
  int32_t tiles;    // side by side
  int32_t columns;  // of a tile
  int32_t runs;

  // Runs that have a row: the first ones.
  RF_HOST_DEVICE int32_t count() const { return rows < runs ? rows : runs; }
  // The first row of a run.
  RF_HOST_DEVICE int32_t begin(int32_t run) const {
    const int32_t each = rows / runs;
    const int32_t more = rows - each * runs;
    return run * each + (run < more ? run : more);
  }
  // Columns of a tile that the convolution has.
  RF_HOST_DEVICE int32_t filled(int32_t first_column) const {
    const int32_t left = width - first_column;
    return left < columns ? left : columns;
  }
  // Pixels of all runs ahead of one.
  RF_HOST_DEVICE int64_t before(int32_t run) const {
    const int32_t first = begin(run);
    const int32_t tile = first / height;
    const int32_t image = tile / tiles;
    const int32_t column = (tile - image * tiles) * columns;
    return int64_t{height} * (int64_t{image} * width + column) +
           int64_t{first - tile * height} * filled(column);
  }
};

// The strips of a run: as many rows of a column of tiles as it has. For StemSteps.
class StemRunStrips {
 public:
  RF_HOST_DEVICE StemRunStrips(const StemRuns& runs, int32_t run)
      : runs_(runs), at_(runs.begin(run)), end_(runs.begin(run + 1)) {}

  RF_HOST_DEVICE bool done() const { return at_ >= end_; }
  RF_HOST_DEVICE StemStrip strip() const {
    const int32_t tile = at_ / runs_.height;
    const int32_t row = at_ - tile * runs_.height;
    const int32_t image = tile / runs_.tiles;
    const int32_t left = runs_.height - row;
    return StemStrip{image, (tile - image * runs_.tiles) * runs_.columns, row,
                     left < end_ - at_ ? left : end_ - at_, 0};
  }
  RF_HOST_DEVICE void next(const StemStrip& strip) { at_ += strip.rows; }

 private:
  const StemRuns& runs_;
  int32_t at_;
  int32_t end_;
};

struct ConvStatsStemArguments {
  ptx::TensorMap y;     // {K, Q, P, N}, boxes of 64 filters of a tile's columns
  StemArguments image;  // x, weight, their sizes and strides; it pools nothing
  StemRuns measured;
  uint32_t* arrivals;     // [column][chunks + 1], zero before the launch
  Moments* moments;       // [run][K]
  WideMoments* merged;    // [chunk][K]; unused where there is one chunk
  float* stats;           // [2, K]: mean, M2
  int64_t cleared_bytes;  // of arrivals: for the launch
  StatsNorm finalized;

  RF_HOST_DEVICE int32_t filters() const { return image.filters; }
};

}  // namespace resnet_fused
