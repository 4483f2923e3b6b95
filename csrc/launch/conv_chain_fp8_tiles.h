// The tiles of conv_chain_fp8 for sm_90a, and its launch. Inside of this room.
#pragma once

#include <cstdint>

#include "conv_chain_tma.h"

namespace resnet_fused {

// As ConvChainTmaTiles, of a byte a channel: half of the bytes leave room for more stages.
template <int kInner, int kNext, int kStages, int kProjected = 0, int kSharing = 1>
using ChainFp8Shape = ChainTmaShape<kInner, kNext, kStages, kProjected, 1, kSharing>;
using ConvChainFp8Tiles = TileList<     //
    ChainFp8Shape<64, 64, 8>,           // the first stage
    ChainFp8Shape<64, 128, 8>,          // its end
    ChainFp8Shape<128, 128, 6>,         // the second stage
    ChainFp8Shape<64, 64, 6, 64>,       // the first stage's first block
    ChainFp8Shape<128, 128, 6, 0, 2>>;  // the second stage: two blocks share filters

// `blocks`: of the grid.
int launch_conv_chain_fp8(const ChainTmaArguments& arguments, int index, int32_t blocks,
                          void* stream);

}  // namespace resnet_fused
