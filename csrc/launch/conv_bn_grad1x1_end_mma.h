// The configurations and launches of conv_bn_grad1x1_end for sm_80 and later. Inside of this room.
#pragma once

#include "../device/grad1x1_geometry.h"
#include "conv_tiles.h"

namespace resnet_fused {

// As Grad1x1Tiles. Two blocks of 64 filters share a multiprocessor, so that one multiplies while
// the other one finishes a step; with 128 channels these would spill. Of 128 filters there is room
// for one block.
using Grad1x1EndTiles = TileList<      //
    Grad1x1Shape<64, 64, 2, 3, 2>,     // behind a block of the first stage
    Grad1x1Shape<128, 128, 4, 2, 1>>;  // of the second one

// The launches of one dtype. index: in Grad1x1EndTiles.
int launch_conv_bn_grad1x1_end_bfloat16(const Grad1x1EndArguments& arguments, int index,
                                        void* stream);
int launch_conv_bn_grad1x1_end_float16(const Grad1x1EndArguments& arguments, int index,
                                       void* stream);

}  // namespace resnet_fused
