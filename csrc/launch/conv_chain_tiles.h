// The tiles of conv_chain's kernel: one list, from which come the instances, the table of
// configurations and what the gates expect.
#pragma once

#include "../device/chain_geometry.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Pixels, channels of next, warps, stages, blocks that are to share a multiprocessor, channels made
// in front. Warps of 32 rows read each filter half as often as warps of 16, and hold twice as many
// sums. A convolution in front is served by the tiles made for it, and by those alone.
using ConvChainTiles = TileList<         //
    ChainShape<128, 64, 4, 3, 2>,        // 64 channels of next: the first stage
    ChainShape<64, 64, 4, 3, 4>,         // fewer pixels
    ChainShape<128, 128, 4, 3, 2>,       // 128 channels: the second stage, the first one's end
    ChainShape<64, 128, 4, 3, 3>,        // fewer pixels; a wide projection's rows fit as well
    ChainShape<128, 256, 8, 3, 1>,       // 256 channels: the second stage's end, the third stage
    ChainShape<64, 256, 4, 3, 2>,        // fewer pixels, less shared memory
    ChainShape<256, 64, 8, 3, 1, 64>,    // a front of 64 channels: fewest reads of its filters
    ChainShape<128, 64, 4, 3, 2, 64>,    // less shared memory
    ChainShape<64, 64, 4, 3, 3, 64>,     // fewer pixels
    ChainShape<128, 128, 4, 3, 2, 64>,   // the first stage's end
    ChainShape<128, 128, 4, 3, 2, 128>,  // a front of 128 channels: the second stage
    ChainShape<64, 128, 4, 3, 2, 128>,   // fewer pixels, less shared memory
    ChainShape<64, 256, 4, 3, 2, 128>>;  // the second stage's end

}  // namespace resnet_fused
