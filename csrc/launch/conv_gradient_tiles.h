// The tiles of the gradients' kernels for sm_80 and later.
#pragma once

#include "../device/gradient_geometry.h"
#include "conv_tiles.h"

namespace resnet_fused {

// As in conv_tiles.h: M, N, warps along M, along N, stages, blocks that are to share a
// multiprocessor, an A100's 164 KB. Three stages: y's tile makes them half as large again, and with
// four of them two blocks of 128x128 would no longer fit; of conv_dgrad's 128x64, three do not.
template <int kM, int kN, int kWarpsM, int kWarpsN, int kBlocks>
using GradientTile = MaskedShape<TileShape<kM, kN, kWarpsM, kWarpsN, 3, kBlocks>>;

using DgradWideTiles = TileList<      //
    GradientTile<128, 128, 2, 2, 2>,  // the work-horse
    GradientTile<128, 64, 2, 2, 2>,   // 64 channels
    GradientTile<64, 64, 2, 2, 4>>;   // small batches, with splits
using DgradNarrowTiles = TileList<    //
    GradientTile<64, 32, 2, 2, 3>>;   // odd channels, NCHW, narrow groups
using WgradWideTiles = TileList<      //
    GradientTile<128, 128, 2, 2, 2>,  // the work-horse
    GradientTile<64, 128, 2, 2, 3>,   // 64 output channels
    GradientTile<64, 64, 2, 2, 4>>;   // the smallest results
using WgradNarrowTiles = TileList<    //
    GradientTile<64, 64, 2, 2, 3>>;   // the stem, odd channels, NCHW

}  // namespace resnet_fused
