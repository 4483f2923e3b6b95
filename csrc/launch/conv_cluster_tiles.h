// The tiles of conv_bn_act for sm_90a whose reduction is shared by a cluster. Their indices follow
// those of conv_window_tiles.h.
#pragma once

#include "../device/cluster_shape.h"
#include "conv_window_tiles.h"

namespace resnet_fused {

// Pixels, stages. 56 is a row of a 56 x 56 image and fits 28 x 28, 14 x 14 and 7 x 7 best; two
// blocks share a multiprocessor, or the next launch's begin beside these.
using ConvClusterTiles = TileList<  //
    ClusterShape<56, 6>,            // one image, or two
    ClusterShape<112, 4>>;          // a few: filters are read half as often

constexpr int kFirstCluster = kFirstWindow + ConvWindowTiles::kSize;

// visit.operator()<n>() for a cluster of so many blocks; portable are up to 8 (CUDA C++ Programming
// Guide, Thread Block Clusters).
constexpr int kMostClusterBlocks = 8;
constexpr bool is_cluster(int64_t blocks) { return blocks == 2 || blocks == 4 || blocks == 8; }
template <class Visit>
auto with_cluster(int blocks, Visit&& visit) {
  if (blocks == 2) return visit.template operator()<2>();
  if (blocks == 4) return visit.template operator()<4>();
  return visit.template operator()<8>();
}

}  // namespace resnet_fused
