// The tiles of conv_chain for sm_90a with a 3x3 convolution in front. Their indices follow those of
// conv_chain_tma_tiles.h.
#pragma once

#include "../device/chain_stream.h"
#include "../device/chain_window.h"
#include "conv_chain_tma_tiles.h"

namespace resnet_fused {

// Channels of next, steps of 64 channels of out, stages, how next's filters come, channels that are
// projected. Where all filters are streamed: channels in front and of next, steps, units of filters
// and shortcuts in flight.
using ConvChainWindowTiles = TileList<                     //
    ChainWindowShape<64, 4, 3, NextFilters::kStay>,        // the first stage
    ChainWindowShape<128, 4, 2, NextFilters::kStream>,     // its end
    ChainWindowShape<64, 4, 2, NextFilters::kStream, 64>,  // its first block
    ChainStreamShape<128, 8, 7, 3>>;                       // the second stage

constexpr int kFirstChainWindow = kFirstChainTma + ConvChainTmaTiles::kSize;

}  // namespace resnet_fused
