// The tiles of a weight's gradient by windows for sm_90a. Their indices follow those of
// wgrad_tma_tiles.h.
#pragma once

#include "../device/wgrad_window.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Positions, stages.
using WgradWindowTiles = TileList<WgradWindowShape<128, 3>>;

}  // namespace resnet_fused
