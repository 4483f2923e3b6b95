// What the plan of a network and its launches share. Inside of this room.
#pragma once

#include <cstdint>

#include "../device/network_layers.h"
#include "../device/network_tiles.h"
#include "conv_tiles.h"

namespace resnet_fused {

// The configuration of conv_bn_act whose tile the layers have, or half of it: the bits of a result
// hang on its parts alone.
constexpr int kNetworkTile = 4;
static_assert(ConvWideTiles::At<kNetworkTile>::kM == NetworkShape::kM &&
              ConvWideTiles::At<kNetworkTile>::kN == NetworkShape::kN);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_network_bfloat16(const NetworkArguments& arguments, int32_t blocks, void* stream);
int launch_network_float16(const NetworkArguments& arguments, int32_t blocks, void* stream);
int launch_network_cluster_bfloat16(const NetworkArguments& arguments, int32_t blocks,
                                    int32_t cluster, void* stream);
int launch_network_cluster_float16(const NetworkArguments& arguments, int32_t blocks,
                                   int32_t cluster, void* stream);

}  // namespace resnet_fused
