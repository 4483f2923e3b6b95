// The tiles of bn_add_act_conv_stats for sm_80 and later.
#pragma once

#include "../device/gradient_geometry.h"
#include "conv_tiles.h"

namespace resnet_fused {

// As in conv_tiles.h: M, N, warps along M, along N, blocks that are to share a multiprocessor.
// Three stages: the shortcut's tile makes them half as large again.
template <int kM, int kN, int kWarpsM, int kWarpsN, int kBlocks>
using BlockEndTile = MaskedShape<TileShape<kM, kN, kWarpsM, kWarpsN, 3, kBlocks>>;

using BlockEndTiles = TileList<       //
    BlockEndTile<128, 256, 2, 4, 1>,  // 256 filters: one column, which alone reads the pixels
    BlockEndTile<128, 128, 2, 2, 2>,  // 128 filters
    BlockEndTile<128, 64, 2, 2, 2>,   // 64 filters
    BlockEndTile<64, 64, 2, 2, 4>>;   // small batches, with splits

// Columns of a tile that serves a projection's shortcut: the values of its BatchNorm leave no
// registers for more sums.
constexpr int kBlockEndProjectedColumns = 128;

}  // namespace resnet_fused
