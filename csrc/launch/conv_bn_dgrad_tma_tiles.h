// The tiles of conv_bn_dgrad for sm_90a. Their indices follow those for sm_80.
#pragma once

#include "../device/bn_dgrad_tma.h"
#include "conv_bn_dgrad_tiles.h"

namespace resnet_fused {

// Input channels, stages, by 128 pixels; blocks that share filters, and pixels. Beside 256 channels
// raw's staging tiles would not fit.
using BnDgradTmaTiles = TileList<   //
    BnDgradTmaShape<128, 3>,        // 128 channels and more
    BnDgradTmaShape<64, 4>,         // 64 channels, small batches
    BnDgradTmaShape<128, 3, 1, 2>,  // 256 channels and more, deep reductions
    BnDgradTmaShape<128, 3, 2, 1>,  // 128 channels, likewise
    BnDgradTmaShape<64, 4, 1, 2>>;  // the last stage, few images

constexpr int kFirstBnDgradTma = BnDgradWideTiles::kSize + BnDgradNarrowTiles::kSize;

}  // namespace resnet_fused
