// What the plan of a network and its launches share. Inside of this room.
#pragma once

#include <cstdint>

#include "../device/network_layers.h"
#include "conv_tiles.h"

namespace resnet_fused {

// The tile of every layer, as one of conv_bn_act's configurations has it: at batch 1 there are few
// pixels, and small tiles with splits fill a GPU. Its ring is deeper: what is asked for ahead of a
// meeting, a step's filters for each stage but one, comes while the blocks wait.
constexpr int kNetworkTile = 4;
using NetworkShape = TileShape<64, 64, 2, 2, 8, 2>;
static_assert(ConvWideTiles::At<kNetworkTile>::kM == NetworkShape::kM &&
              ConvWideTiles::At<kNetworkTile>::kN == NetworkShape::kN);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_network_bfloat16(const NetworkArguments& arguments, int32_t blocks, void* stream);
int launch_network_float16(const NetworkArguments& arguments, int32_t blocks, void* stream);

}  // namespace resnet_fused
