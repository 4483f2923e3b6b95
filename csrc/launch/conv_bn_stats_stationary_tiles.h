// The configurations of conv_bn_stats for sm_90a whose filters stay. Their indices follow those of
// conv_bn_stats_stem_tiles.h.
#pragma once

#include "../device/stationary_shape.h"
#include "conv_bn_stats_stem_tiles.h"

namespace resnet_fused {

// Stages, and steps whose filters fit beside them: 256 channels, and 512.
using StatsStationaryTiles = TileList<StationaryShape<8, 4>, StationaryShape<4, 8>>;

constexpr int kFirstStatsStationary = kFirstStatsStem + StatsStemTiles::kSize;

}  // namespace resnet_fused
