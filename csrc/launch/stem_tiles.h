// The shapes of the stem's kernel: from them come the instances and the table of configurations.
// Inside of this room.
#pragma once

#include "../device/stem_tile.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Warps side by side, tiles of 16 columns a warp, blocks that are to share a multiprocessor. The
// weights take half of the registers that eight warps can have.
using StemShapes = TileList<  //
    StemShape<4, 2, 1>,       // 56 pooled columns: a row of 224x224 images
    StemShape<2, 2, 2>,       // 28: narrower images
    StemShape<2, 1, 2>>;      // 14: too few images to fill the GPU

// Each dtype's .cu file makes its own. blocks: along x.
int launch_stem_bfloat16(const StemArguments& arguments, int configuration, int32_t blocks,
                         void* stream);
int launch_stem_float16(const StemArguments& arguments, int configuration, int32_t blocks,
                        void* stream);

}  // namespace resnet_fused
