// The tiles of a weight's gradient for sm_90a. Their indices follow those of an op for sm_80.
#pragma once

#include "../device/wgrad_tma.h"
#include "conv_tiles.h"

namespace resnet_fused {

using WideWgradTile = WgradTmaShape<128, 256, 3>;

// Output channels, columns, stages; blocks that share dy and y, and blocks that share x.
using WgradTmaTiles = TileList<              //
    WideWgradTile,                           // the work-horse
    WgradTmaShape<128, 128, 4>,              // 128 columns, or too few steps to share wider tiles'
    WgradTmaShape<128, 64, 5>,               // 64 columns
    WgradTmaShape<64, 384, 3>,               // 64 output channels: 3x3
    WgradTmaShape<64, 256, 4>,               // 1x1
    WgradTmaShape<64, 128, 6>,               // 1x1 of 64 input channels
    SharedWgradShape<WideWgradTile, 2, 1>,   // 128 output channels, x as it is
    SharedWgradShape<WideWgradTile, 1, 2>,   // 256 columns, likewise
    SharedWgradShape<WideWgradTile, 2, 2>>;  // more of both, likewise

}  // namespace resnet_fused
