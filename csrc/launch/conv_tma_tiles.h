// The tiles of conv_bn_act for sm_90a. Their indices follow those of conv_tiles.h.
#pragma once

#include "../device/warpgroup_shape.h"
#include "conv_tiles.h"

namespace resnet_fused {

template <Consumers kConsumers, int kPixels, int kChannels, int kStages, int kFilterSharing = 1>
using PixelsLeft = WarpgroupShape<Orientation::kPixelsLeft, kConsumers, kPixels, kChannels, kStages,
                                  kFilterSharing>;
template <Consumers kConsumers, int kPixels, int kChannels, int kStages, int kFilterSharing = 1,
          int kPixelSharing = 1>
using ChannelsLeft = WarpgroupShape<Orientation::kChannelsLeft, kConsumers, kPixels, kChannels,
                                    kStages, kFilterSharing, kPixelSharing>;

// Pixels, channels, stages, blocks that share filters, blocks that share pixels. A product of 256
// columns takes 63% of shared memory's bandwidth, one of 64 columns would take all of it.
using ConvTmaTiles = TileList<                        //
    PixelsLeft<Consumers::kTogether, 128, 256, 3>,    // 256 channels and more
    PixelsLeft<Consumers::kTogether, 128, 128, 4>,    // too few pixels to fill the GPU with those
    ChannelsLeft<Consumers::kTogether, 256, 128, 3>,  // 128 channels
    ChannelsLeft<Consumers::kTogether, 192, 128, 4>,  // images of 7x7: they fill whole waves
    ChannelsLeft<Consumers::kInTurns, 256, 64, 4>,    // 64 channels
    ChannelsLeft<Consumers::kInTurns, 128, 64, 6>,    // small batches
    // The same where L2 would be asked for more than products take time for: deep reductions.
    PixelsLeft<Consumers::kTogether, 128, 256, 3, 2>,    //
    ChannelsLeft<Consumers::kTogether, 256, 128, 3, 2>,  //
    ChannelsLeft<Consumers::kTogether, 192, 128, 4, 2>,  //
    // Pixels for neighbouring tiles of channels: the last two stages, made for 32 images.
    ChannelsLeft<Consumers::kTogether, 192, 128, 4, 1, 2>,  // 1x1, of many images too
    ChannelsLeft<Consumers::kInTurns, 224, 64, 4, 1, 4>,    // 3x3 at 14x14
    ChannelsLeft<Consumers::kInTurns, 128, 64, 7, 2, 4>>;   // 3x3 at 7x7

constexpr int kFirstTma = ConvWideTiles::kSize + ConvNarrowTiles::kSize;

}  // namespace resnet_fused
