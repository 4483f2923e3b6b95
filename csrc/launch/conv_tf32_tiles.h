// The tiles of conv_bn_act for sm_90a on float32. Their indices follow those of
// conv_cluster_tiles.h.
#pragma once

#include "../device/tf32_shape.h"
#include "conv_cluster_tiles.h"

namespace resnet_fused {

template <Consumers kConsumers, int kPixels, int kChannels, int kStages, int kFilterSharing = 1,
          int kPixelSharing = 1>
using Tf32 =
    Tf32Shape<ChannelsLeft<kConsumers, kPixels, kChannels, kStages, kFilterSharing, kPixelSharing>>;

// As ConvTmaTiles, with half the channels in a step and a staging twice as large.
using ConvTf32Tiles = TileList<                     //
    Tf32<Consumers::kTogether, 192, 128, 3>,        // few tiles
    Tf32<Consumers::kTogether, 192, 128, 3, 2>,     // 128 channels
    Tf32<Consumers::kTogether, 192, 128, 3, 1, 2>,  // images of 7x7: these fill whole waves
    Tf32<Consumers::kTogether, 192, 128, 3, 2, 2>,  // 256 channels and more, deep reductions
    Tf32<Consumers::kInTurns, 192, 64, 4, 2>,       // 64 channels
    Tf32<Consumers::kInTurns, 128, 64, 6>,          // small batches
    Tf32<Consumers::kInTurns, 224, 64, 3, 1, 4>,    // the last two stages at 32 images: 14x14
    Tf32<Consumers::kInTurns, 128, 64, 6, 2, 4>>;   // 7x7

constexpr int kFirstTf32 = kFirstCluster + ConvClusterTiles::kSize;

}  // namespace resnet_fused
