// The tiles of conv_bn_stats for sm_90a. Their indices follow those of conv_bn_stats_tiles.h.
#pragma once

#include "conv_bn_stats_tiles.h"
#include "conv_tma_tiles.h"

namespace resnet_fused {

// As in conv_tma_tiles.h, with channels on the left alone: with pixels there a channel's sum would
// take three shuffles of every thread for every pair of columns, 3,072 cycles of a tile of 128 x
// 256, which is three steps' products. 256 x 128 asks L2 for as much as 128 x 256.
using StatsTmaTiles = TileList<                       //
    ChannelsLeft<Consumers::kTogether, 256, 128, 3>,  // 128 channels and more
    ChannelsLeft<Consumers::kTogether, 192, 128, 4>,  // images of 7x7: they fill whole waves
    // 64 channels; with 256 pixels ptxas spills a register.
    ChannelsLeft<Consumers::kInTurns, 192, 64, 5>,
    ChannelsLeft<Consumers::kInTurns, 128, 64, 6>,       // small batches
    ChannelsLeft<Consumers::kTogether, 256, 128, 3, 2>,  // deep reductions
    // Likewise of several tiles of channels.
    ChannelsLeft<Consumers::kTogether, 256, 128, 3, 1, 2>,
    ChannelsLeft<Consumers::kTogether, 192, 128, 4, 1, 2>>;

constexpr int kFirstStatsTma = kFirstImageStats + StatsImageTiles::kSize;

}  // namespace resnet_fused
