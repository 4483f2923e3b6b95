// The tiles of conv_bn_dgrad by windows beside a ring of filters for sm_90a. Their indices follow
// those of conv_bn_dgrad_window_tiles.h.
#pragma once

#include "conv_bn_dgrad_window_tiles.h"

namespace resnet_fused {

// Positions, taps' filters in flight: as conv_bn_stats_stream_tiles.h.
using BnDgradStreamTiles = TileList<BnDgradStreamShape<256, 6>, BnDgradStreamShape<192, 6>>;

constexpr int kFirstBnDgradStream = kFirstBnDgradWindow + BnDgradWindowTiles::kSize;

}  // namespace resnet_fused
