// The tiles of conv_bn_grad1x1 for sm_90a. Their indices follow those for sm_80.
#pragma once

#include "../device/grad1x1_tma.h"
#include "conv_bn_grad1x1_tiles.h"

namespace resnet_fused {

// Filters, channels, pixels of a step, stages.
using Grad1x1TmaTiles = TileList<       //
    Grad1x1TmaShape<64, 64, 64, 6>,     // reductions
    Grad1x1TmaShape<64, 256, 32, 4>,    // of many channels
    Grad1x1TmaShape<256, 64, 32, 4>,    // expansions
    Grad1x1TmaShape<128, 128, 32, 4>>;  // reductions of the next stage, by columns of channels

constexpr int kFirstGrad1x1Tma = Grad1x1Tiles::kSize;

}  // namespace resnet_fused
