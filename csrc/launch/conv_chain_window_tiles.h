// The tiles of conv_chain for sm_90a with a 3x3 convolution in front. Their indices follow those of
// conv_chain_tma_tiles.h.
#pragma once

#include "../device/chain_window.h"
#include "conv_chain_tma_tiles.h"

namespace resnet_fused {

// Channels of next, steps of 64 channels of out, stages. With 128 channels of next its filters
// leave room for a window and a single step, and nothing comes while that is in use.
using ConvChainWindowTiles = TileList<ChainWindowShape<64, 4, 3>>;  // the first stage

constexpr int kFirstChainWindow = kFirstChainTma + ConvChainTmaTiles::kSize;

}  // namespace resnet_fused
