// The tiles of conv_bn_dgrad_end for sm_80 and later, and where those for sm_90a begin.
#pragma once

#include "conv_bn_dgrad_tiles.h"

namespace resnet_fused {

// conv_bn_dgrad's: what more the end of a tile reads comes while other blocks multiply.
using BnDgradEndWideTiles = BnDgradWideTiles;
using BnDgradEndNarrowTiles = BnDgradNarrowTiles;

constexpr int kFirstBnDgradEndTma = BnDgradEndWideTiles::kSize + BnDgradEndNarrowTiles::kSize;

}  // namespace resnet_fused
