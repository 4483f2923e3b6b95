// The configurations of conv_bn_grad1x1 for sm_80 and later.
#pragma once

#include "../device/grad1x1_geometry.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Filters, channels, warps along the filters, stages, blocks that are to share a multiprocessor.
using Grad1x1Tiles = TileList<        //
    Grad1x1Shape<64, 64, 2, 3, 2>,    // reductions
    Grad1x1Shape<64, 256, 2, 2, 1>,   // of many channels
    Grad1x1Shape<256, 64, 4, 3, 1>>;  // expansions

}  // namespace resnet_fused
