// The tiles of conv_bn_act's window kernel for sm_90a. Their indices follow those of
// conv_tma_tiles.h.
#pragma once

#include "../device/conv_window.h"
#include "conv_tma_tiles.h"

namespace resnet_fused {

// Positions. Tiles of 56 x 56 images, 3,249 positions each, on 132 multiprocessors: 256 images are
// 32.8 rounds of 192; 32 images are 4.1 rounds of those, but 3.8 of 208; a single one is 34 tiles
// of 96.
using ConvWindowTiles = TileList<WindowShape<192>, WindowShape<208>, WindowShape<96>>;

constexpr int kFirstWindow = kFirstTma + ConvTmaTiles::kSize;

}  // namespace resnet_fused
