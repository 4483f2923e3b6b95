// The tiles of conv_chain for sm_90a. Their indices follow those of conv_chain_tiles.h.
#pragma once

#include "../device/chain_tma.h"
#include "conv_chain_tiles.h"

namespace resnet_fused {

// Channels of what the first convolution reads, of next, stages, channels that are projected.
using ConvChainTmaTiles = TileList<  //
    ChainTmaShape<64, 64, 4>,        // the first stage
    ChainTmaShape<64, 128, 4>,       // its end
    ChainTmaShape<128, 128, 3>,      // the second stage
    ChainTmaShape<64, 64, 3, 64>>;   // the first stage's first block

constexpr int kFirstChainTma = ConvChainTiles::kSize;

}  // namespace resnet_fused
