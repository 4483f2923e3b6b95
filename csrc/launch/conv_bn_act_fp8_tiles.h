// The tiles of conv_bn_act_fp8 for sm_90a, and its launches. Inside of this room.
#pragma once

#include <cstdint>

#include "../device/tma_conv.h"
#include "conv_tma_tiles.h"

namespace resnet_fused {

// Pixels, channels, stages. A thread holds the sums of a tile and those of a step: 192 columns are
// what its registers have room for.
using ConvFp8Tiles = TileList<                        //
    PixelsLeft<Consumers::kTogether, 128, 128, 6>,    // 128 channels and more
    ChannelsLeft<Consumers::kTogether, 192, 128, 4>,  // likewise: less is read from shared memory
    ChannelsLeft<Consumers::kInTurns, 128, 64, 6>>;   // 64 channels, small batches

// The launches for one type of the output; `blocks`: of the grid.
int launch_conv_bn_act_fp8_e4m3(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                void* stream);
int launch_conv_bn_act_fp8_bfloat16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                    void* stream);
int launch_conv_bn_act_fp8_float16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                   void* stream);

}  // namespace resnet_fused
