// The tiles of conv_bn_stats by windows for sm_90a. Their indices follow those of
// conv_bn_stats_tma_tiles.h.
#pragma once

#include "../device/conv_window.h"
#include "conv_bn_stats_tma_tiles.h"

namespace resnet_fused {

// As conv_window_tiles.h has them.
using StatsWindowTiles = TileList<WindowShape<192>, WindowShape<208>, WindowShape<96>>;

constexpr int kFirstStatsWindow = kFirstStatsTma + StatsTmaTiles::kSize;

}  // namespace resnet_fused
