// The convolutions of a whole network in one launch, for sm_80 and later: at batch 1 a layer's work
// takes a few microseconds, and a launch for each costs about as much. How the blocks go through
// the layers is in network_walk.h.
//
// Where a layer's reductions are cut, the blocks that hold a tile's parts meet by themselves in
// global memory, and each finishes a share.
#pragma once

#include "../device/network_walk.h"
#include "../device/split_shares.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    network_kernel(const __grid_constant__ NetworkArguments arguments) {
  walk_network<T, NetworkTiles<Shape>, kWidth, MergeByMemory>(arguments);
}

}  // namespace resnet_fused
