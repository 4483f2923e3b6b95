// The shapes of the head's product: from them come the instances and the table of configurations.
// Inside of this room.
#pragma once

#include "../device/head_tile.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Tiles of 16 images, tiles of 8 classes, warps that share a reduction.
using HeadShapes = TileList<  //
    HeadShape<1, 1, 8>,       // few images: 1000 classes make 125 blocks
    HeadShape<1, 4, 8>,       // more, whose means are read a quarter as often
    HeadShape<4, 4, 4>>;      // many: neither operand is read often

int launch_head_bfloat16(const HeadArguments& arguments, int configuration, bool wide,
                         void* stream);
int launch_head_float16(const HeadArguments& arguments, int configuration, bool wide, void* stream);

}  // namespace resnet_fused
