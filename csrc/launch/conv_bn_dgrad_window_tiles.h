// The tiles of conv_bn_dgrad's window kernel for sm_90a. Their indices follow those of
// conv_bn_dgrad_tma_tiles.h.
#pragma once

#include "../device/bn_dgrad_window.h"
#include "conv_bn_dgrad_tma_tiles.h"

namespace resnet_fused {

// Positions, as conv_bn_act's: rows of 56 pixels leave 192 all of a block's shared memory, with one
// tensor at a tile's end; 96 are for a few images, for wider rows, and for raw beside an addend.
using BnDgradWindowTiles = TileList<BnDgradWindowShape<192>, BnDgradWindowShape<96>>;

constexpr int kFirstBnDgradWindow = kFirstBnDgradTma + BnDgradTmaTiles::kSize;

}  // namespace resnet_fused
