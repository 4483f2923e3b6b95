// The tiles of conv_bn_grad1x1_end for sm_90a.
#pragma once

#include "../device/grad1x1_tma.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Filters, channels, pixels of a step, stages. All of a stage is there behind a projection; more
// channels of a block would leave two stages of 32 pixels.
using Grad1x1EndTmaTiles = TileList<          //
    Grad1x1TmaShape<64, 128, 32, 4, true>,    // behind a block of the first stage
    Grad1x1TmaShape<128, 128, 16, 4, true>>;  // of the second one

}  // namespace resnet_fused
