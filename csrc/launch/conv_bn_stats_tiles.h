// The tiles of conv_bn_stats for sm_80 and later.
#pragma once

#include "../device/halo_shape.h"
#include "../device/image_window_shape.h"
#include "conv_tiles.h"

namespace resnet_fused {

// As in conv_tiles.h: M, N, warps along M, along N, stages, blocks that are to share a
// multiprocessor. No tile of 256 pixels: its one block would neither load nor multiply while it
// measures.
using StatsWideTiles = TileList<      //
    TileShape<128, 128, 2, 2, 4, 2>,  // the work-horse
    TileShape<128, 64, 2, 2, 4, 3>,   // 64 channels
    TileShape<64, 64, 2, 2, 4, 4>>;   // small batches, with splits
using StatsNarrowTiles = TileList<    //
    TileShape<128, 64, 4, 1, 4, 2>,   // images that do not come by rows
    TileShape<64, 32, 2, 2, 4, 3>>;   // odd channels, NCHW, narrow groups

// 3x3 filters behind a BatchNorm whose pixels are turned once for all taps. Two windows of 56 x 56
// images take 30 KiB.
using StatsHaloTiles = TileList<      //
    HaloShape<128, 128, 2, 2, 4, 2>,  //
    HaloShape<128, 64, 2, 2, 4, 3>,   //
    HaloShape<64, 64, 2, 2, 4, 4>>;

// Images of a few channels by their rows: M, N, warps along M and N, blocks.
using StatsImageTiles = TileList<         //
    ImageWindowShape<128, 64, 2, 2, 4>>;  // the stem

constexpr int kFirstNarrowStats = StatsWideTiles::kSize;
constexpr int kFirstHaloStats = kFirstNarrowStats + StatsNarrowTiles::kSize;
constexpr int kFirstImageStats = kFirstHaloStats + StatsHaloTiles::kSize;

}  // namespace resnet_fused
