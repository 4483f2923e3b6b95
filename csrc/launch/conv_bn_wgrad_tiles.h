// The tiles of conv_bn_wgrad for sm_80 and later.
#pragma once

#include "../device/halo_wgrad_shape.h"
#include "../device/image_shape.h"
#include "conv_gradient_tiles.h"

namespace resnet_fused {

// Of every element that a block reads of dz it reads one of y too: (2 M + N) 64 bytes a step, so
// that wide tiles ask the least of L2 for a product.
using BnWgradWideTiles = TileList<    //
    GradientTile<128, 256, 2, 4, 1>,  // from 256 columns on
    GradientTile<128, 128, 2, 2, 2>,  // 128 input channels
    GradientTile<128, 64, 2, 2, 2>,   // 64 input channels of a 1x1
    GradientTile<64, 128, 2, 2, 3>,   // 64 output channels
    GradientTile<64, 64, 2, 2, 4>,    // the smallest results
    HaloWgradShape<64, 2, 2, 3, 2>>;  // 9 taps of 32 channels
using BnWgradNarrowTiles = TileList<  //
    GradientTile<64, 64, 2, 2, 2>>;   // odd channels, NCHW
// M, warps along M and N, stages, blocks. A thread has 112 sums.
using BnWgradImageTiles = TileList<  //
    ImageShape<64, 2, 2, 3, 2>>;     // the stem

}  // namespace resnet_fused
