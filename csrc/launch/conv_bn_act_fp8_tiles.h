// The tiles of conv_bn_act_fp8 for sm_90a, and its launches. Inside of this room.
#pragma once

#include <cstdint>

#include "../device/tma_conv.h"
#include "conv_bn_act_window.h"
#include "conv_tma_tiles.h"

namespace resnet_fused {

// Pixels, channels, stages, blocks that share filters, blocks that share pixels. A thread holds the
// sums of a tile and those of a step: 192 columns are what its registers have room for.
using ConvFp8Tiles = TileList<                        //
    PixelsLeft<Consumers::kTogether, 128, 128, 6>,    // 128 channels and more
    ChannelsLeft<Consumers::kTogether, 192, 128, 4>,  // likewise: less is read from shared memory
    ChannelsLeft<Consumers::kInTurns, 128, 64, 6>,    // 64 channels, small batches
    // The same where L2 would take 1.6 times as long for a step as its products: blocks share it.
    // Pixels are the larger part.
    ChannelsLeft<Consumers::kTogether, 192, 128, 4, 2>,     // up to 128 channels
    ChannelsLeft<Consumers::kTogether, 192, 128, 4, 1, 2>,  // 256 and more
    // Both sides for four blocks: fewer images, whose tiles are small to be as many as the blocks.
    ChannelsLeft<Consumers::kTogether, 128, 128, 6, 2, 2>,  // 4 to 64
    ChannelsLeft<Consumers::kTogether, 64, 128, 8, 2, 2>,   // 2 to 32
    ChannelsLeft<Consumers::kInTurns, 64, 64, 12, 2, 2>>;   // 16 and less

// Windows of 3x3 convolutions of 64 channels: positions, bytes of one, passes. Of 56 x 56 images,
// 3,249 positions each, on 132 multiprocessors 256 are 32.8 rounds of 192; 32 are 4.1 rounds of
// those, but 4.9 of 160.
using ConvFp8WindowTiles =
    TileList<WindowShape<192, 64, 2>, WindowShape<160, 64, 2>, WindowShape<96, 64, 2>>;

constexpr int kFirstFp8Window = ConvFp8Tiles::kSize;

// The launches for one type of the output; `blocks`: of the grid.
int launch_conv_bn_act_fp8_e4m3(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                void* stream);
int launch_conv_bn_act_fp8_bfloat16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                    void* stream);
int launch_conv_bn_act_fp8_float16(const ConvTmaArguments& arguments, int index, int32_t blocks,
                                   void* stream);

// Likewise by windows; `index`: in ConvFp8WindowTiles.
int launch_conv_bn_act_fp8_window_e4m3(const ConvWindowArguments& arguments, int index,
                                       const WindowGrid& grid, void* stream);
int launch_conv_bn_act_fp8_window_bfloat16(const ConvWindowArguments& arguments, int index,
                                           const WindowGrid& grid, void* stream);
int launch_conv_bn_act_fp8_window_float16(const ConvWindowArguments& arguments, int index,
                                          const WindowGrid& grid, void* stream);

}  // namespace resnet_fused
