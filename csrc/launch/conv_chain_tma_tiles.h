// The tiles of conv_chain for sm_90a. Their indices follow those of conv_chain_tiles.h.
#pragma once

#include "../device/chain_rings.h"
#include "../device/chain_tma.h"
#include "conv_chain_tiles.h"

namespace resnet_fused {

// Two blocks share the filters.
template <int kInner, int kNext, int kStages, int kProjected = 0>
using ChainSharedShape = ChainTmaShape<kInner, kNext, kStages, kProjected, 2, 2>;

// Channels of what the first convolution reads, of next, stages, channels that are projected; where
// the parts of a step have rings of their own: stages of filters that make out and that read it,
// and of the shortcut, channels that are projected.
using ConvChainTmaTiles = TileList<            //
    ChainTmaShape<64, 64, 4>,                  // the first stage
    ChainTmaShape<64, 128, 4>,                 // its end
    ChainTmaShape<128, 128, 3>,                // the second stage
    ChainTmaShape<64, 64, 3, 64>,              // the first stage's first block
    ChainSharedShape<64, 128, 4>,              // the first stage's end: fewest filters from L2
    ChainSharedShape<128, 128, 3>,             // the second stage
    ChainSharedShape<64, 64, 3, 64>,           // the first stage's first block
    ChainRingsShape<128, 256, 2, 2, 3>,        // the second stage's end
    ChainRingsShape<128, 128, 4, 2, 1, 256>>;  // its first block

constexpr int kFirstChainTma = ConvChainTiles::kSize;

}  // namespace resnet_fused
