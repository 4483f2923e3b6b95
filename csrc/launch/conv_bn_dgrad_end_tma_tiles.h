// The tiles of conv_bn_dgrad_end for sm_90a. Their indices follow those for sm_80.
#pragma once

#include "conv_bn_dgrad_end_tiles.h"
#include "conv_bn_dgrad_tma_tiles.h"

namespace resnet_fused {

// conv_bn_dgrad's: `out` and raw have one staging tile in turn, and so fit where raw alone did.
using BnDgradEndTmaTiles = BnDgradTmaTiles;

}  // namespace resnet_fused
