// The tiles of conv_wgrad for sm_90a. Their indices follow those for sm_80.
#pragma once

#include "../device/wgrad_tma.h"
#include "conv_gradient_tiles.h"

namespace resnet_fused {

// Output channels, columns, stages.
using WgradTmaTiles = TileList<  //
    WgradTmaShape<128, 256, 3>,  // the work-horse
    WgradTmaShape<128, 128, 4>,  // 128 columns, or too few steps to share wider tiles'
    WgradTmaShape<128, 64, 5>,   // 64 columns
    WgradTmaShape<64, 384, 3>,   // 64 output channels: 3x3
    WgradTmaShape<64, 256, 4>,   // 1x1
    WgradTmaShape<64, 128, 6>>;  // 1x1 of 64 input channels

constexpr int kFirstWgradTma = WgradWideTiles::kSize + WgradNarrowTiles::kSize;

}  // namespace resnet_fused
