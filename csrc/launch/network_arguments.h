// What the plan of a network and its launches share. Inside of this room.
#pragma once

#include <cstdint>

#include "../device/network_layers.h"
#include "conv_tiles.h"

namespace resnet_fused {

// The tile of every layer: at batch 1 there are few pixels, and small tiles with splits fill a GPU.
constexpr int kNetworkTile = 4;
using NetworkShape = ConvWideTiles::At<kNetworkTile>;
static_assert(NetworkShape::kM == 64 && NetworkShape::kN == 64);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_network_bfloat16(const NetworkArguments& arguments, int32_t blocks, void* stream);
int launch_network_float16(const NetworkArguments& arguments, int32_t blocks, void* stream);

}  // namespace resnet_fused
