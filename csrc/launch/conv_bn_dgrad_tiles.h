// The tiles of conv_bn_dgrad for sm_80 and later.
#pragma once

#include "../device/halo_shape.h"
#include "conv_gradient_tiles.h"

namespace resnet_fused {

// As conv_dgrad's: M counts input pixels of a phase, N input channels. Windows hold dz, which
// becomes dy, twice, and y.
using BnDgradWideTiles = TileList<    //
    GradientTile<128, 128, 2, 2, 2>,  // the work-horse
    GradientTile<128, 64, 2, 2, 2>,   // 64 channels
    GradientTile<64, 64, 2, 2, 3>,    // small batches, with splits
    HaloShape<128, 128, 2, 2, 4, 2, 3>, HaloShape<128, 64, 2, 2, 4, 2, 3>,
    HaloShape<64, 64, 2, 2, 4, 3, 3>>;
using BnDgradNarrowTiles = TileList<  //
    GradientTile<64, 32, 2, 2, 2>>;   // odd channels, NCHW, narrow groups

// Columns of a tile that serves float: the fragments of TF32 leave no registers for 128 x 128 sums
// beside y and the coefficients.
constexpr int kBnDgradFloatColumns = 64;

}  // namespace resnet_fused
