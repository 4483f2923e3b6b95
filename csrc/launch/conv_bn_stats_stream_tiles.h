// The tiles of conv_bn_stats by windows beside a ring of filters for sm_90a. Their indices follow
// those of conv_bn_stats_window_tiles.h.
#pragma once

#include "../device/stream_window.h"
#include "conv_bn_stats_window_tiles.h"

namespace resnet_fused {

// Positions, taps' filters in flight. Of 256 images on 132 multiprocessors the blocks of 64 filters
// have 3,262 positions each of 128 channels, 1,746 of 256 and 1,024 of 512: 17 tiles of 192; 7 and
// 4 of 256.
using StatsStreamTiles = TileList<StreamWindowShape<256, 6>, StreamWindowShape<192, 6>>;

constexpr int kFirstStatsStream = kFirstStatsWindow + StatsWindowTiles::kSize;

}  // namespace resnet_fused
