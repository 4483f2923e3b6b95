// What conv_bn_stats' window kernel for sm_90a is told, and the order of its tiles. Plain values,
// which a launch computes on the host.
//
// Each of a block's two consumers has a run of tiles that follow one another. So the pixels ahead
// of a run are known by where it begins, although a tile has more of them or fewer.
#pragma once

#include <cstdint>

#include "conv_window.h"
#include "portable.h"
#include "stats_geometry.h"
#include "stats_norm.h"
#include "tma_conv.h"

namespace resnet_fused {

// Runs of tiles of positions, one for each consumer of each block of a column: those of all first
// consumers, then those of the second ones. The first runs may have a tile more than others.
struct WindowRuns {
  PixelGrid walk;     // as ConvWindowArguments have it
  int32_t positions;  // of a tile
  int32_t tiles;
  int32_t runs;

  // Runs that have a tile: the first ones.
  RF_HOST_DEVICE int32_t count() const { return tiles < runs ? tiles : runs; }
  // The first tile of a run.
  RF_HOST_DEVICE int32_t begin(int32_t run) const {
    const int32_t each = tiles / runs;
    const int32_t more = tiles - each * runs;
    return run * each + (run < more ? run : more);
  }
  // Pixels of all runs ahead of one.
  RF_HOST_DEVICE int64_t before(int32_t run) const {
    const int64_t first = int64_t{begin(run)} * positions;
    const Pixel at =
        pixel_of(first < walk.pixels ? static_cast<int32_t>(first) : walk.pixels, walk);
    const auto width = static_cast<int32_t>(walk.columns.value) - 1;
    const auto height = static_cast<int32_t>(walk.rows.value) - 1;
    // Below an image there is none, however far a position is in that row.
    const int32_t more = at.p < height ? at.q : 0;
    return (int64_t{at.n} * height + at.p) * width + more;
  }
};

// The tiles of a block: of both of its runs, in turns.
class RunWalk {
 public:
  // block: of those of a column.
  RF_HOST_DEVICE RunWalk(const WindowRuns& runs, int32_t block)
      : mine_(run_of(runs, block)), other_(run_of(runs, block + runs.runs / kConsumers)) {}

  RF_HOST_DEVICE bool done() const { return mine_.at >= mine_.end; }
  RF_HOST_DEVICE void next() {
    const Run been{mine_.at + 1, mine_.end};
    mine_ = other_;
    other_ = been;
  }
  RF_HOST_DEVICE int32_t index() const { return mine_.at; }

 private:
  struct Run {
    int32_t at;
    int32_t end;
  };
  static RF_HOST_DEVICE Run run_of(const WindowRuns& runs, int32_t run) {
    return {runs.begin(run), runs.begin(run + 1)};
  }

  Run mine_;
  Run other_;
};

struct ConvStatsWindowArguments {
  ConvWindowArguments conv;  // out is y; there is no residual, scale or shift
  NormedImages norm;         // of the layer before
  WindowRuns measured;
  int32_t channels;       // K
  int32_t slices;         // of 64 channels of x
  uint32_t* arrivals;     // [column][chunks + 1], zero before the launch
  Moments* moments;       // [run][K]
  WideMoments* merged;    // [chunk][K]; unused where there is one chunk
  float* stats;           // [2, K]: mean, M2
  int64_t cleared_bytes;  // of arrivals: for the launch
  StatsNorm finalized;

  RF_HOST_DEVICE int32_t filters() const { return channels; }
};

}  // namespace resnet_fused
