// The tiles of conv_bn_stats of a stem for sm_90a. Their indices follow those of
// conv_bn_stats_stream_tiles.h.
#pragma once

#include "../device/stem_stats.h"
#include "conv_bn_stats_stream_tiles.h"

namespace resnet_fused {

// Columns of a tile, as stem_wgmma.h has them: a row of 224x224 images, and other widths.
using StatsStemTiles = TileList<StemStatsShape<112>, StemStatsShape<64>>;

constexpr int kFirstStatsStem = kFirstStatsStream + StatsStreamTiles::kSize;

}  // namespace resnet_fused
