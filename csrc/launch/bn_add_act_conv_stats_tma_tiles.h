// The tiles of bn_add_act_conv_stats for sm_90a. Their indices follow those of
// bn_add_act_conv_stats_tiles.h.
#pragma once

#include "../device/block_end_shape.h"
#include "bn_add_act_conv_stats_tiles.h"

namespace resnet_fused {

// Pixels, channels, stages.
using BlockEndTmaTiles = TileList<  //
    BlockEndShape<128, 256, 3>,     // 256 channels and more: made once for all of them
    BlockEndShape<128, 128, 4>,     // up to 128
    BlockEndShape<64, 256, 4>,      // small batches
    BlockEndShape<64, 128, 6>>;     // likewise

constexpr int kFirstBlockEndTma = BlockEndTiles::kSize;

}  // namespace resnet_fused
