// What tiles of pixels leave of a channel is merged chunk after chunk. Plain values, of host and
// device.
#pragma once

#include <cstdint>

#include "portable.h"

namespace resnet_fused {

// So many tiles of pixels are merged by one block, the last of them: few enough for the block that
// ends a launch, enough for the one that merges what they make.
constexpr int32_t kChunkTiles = 64;

struct TileChunks {
  int32_t tiles;  // of all launches

  RF_HOST_DEVICE int32_t count() const { return (tiles + kChunkTiles - 1) / kChunkTiles; }
  // The first tile of a chunk, or behind the last chunk the end.
  RF_HOST_DEVICE int32_t begin(int32_t chunk) const {
    const int32_t first = chunk * kChunkTiles;
    return first < tiles ? first : tiles;
  }
};

// A column's two sums over parts of it.
struct alignas(16) ColumnSums {
  double first;
  double second;
};

// Where a block's tile lies among those that leave something.
struct MeasuredColumn {
  uint32_t index;   // of the columns of tiles, over all groups
  int32_t channel;  // the tile's first one
  int32_t columns;  // that exist
};

}  // namespace resnet_fused
