// The tiles of conv_dgrad for sm_90a. Their indices follow those for sm_80.
#pragma once

#include "../device/dgrad_tma.h"
#include "conv_gradient_tiles.h"

namespace resnet_fused {

// Input channels, stages, by 128 pixels; blocks that share filters, and pixels.
using DgradTmaTiles = TileList<    //
    DgradTmaShape<256, 2>,         // 256 channels and more
    DgradTmaShape<128, 4>,         // 128 channels, or too few pixels to fill the GPU with those
    DgradTmaShape<64, 5>,          // 64 channels
    DgradTmaShape<256, 2, 2, 1>,   // 256 channels and more, deep reductions
    DgradTmaShape<128, 4, 2, 2>>;  // likewise, few images

constexpr int kFirstDgradTma = DgradWideTiles::kSize + DgradNarrowTiles::kSize;

}  // namespace resnet_fused
