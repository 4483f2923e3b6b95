// The grid of a weight's gradient for sm_90a.
#pragma once

#include <cstdint>

#include "../device/wgrad_cluster.h"
#include "conv_wgrad_merge.cuh"

namespace resnet_fused {

// Whole clusters, each of blocks that follow one another.
template <class Shape>
uint32_t wgrad_tma_grid(const TileGrid& tiles) {
  return wgrad_tiles(cluster_tiles<Shape>(tiles)) * Shape::kSharing *
         static_cast<uint32_t>(tiles.splits);
}

}  // namespace resnet_fused
