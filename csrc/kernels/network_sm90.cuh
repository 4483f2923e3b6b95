// The convolutions of a whole network in one launch, for sm_90a: as network_sm80.cuh, in clusters
// of blocks. Where a layer's reductions are cut, the parts of a tile are blocks of one cluster, and
// their sums meet in its shared memory: no flag, and no way through L2.
#pragma once

#include "../device/network_walk.h"
#include "../device/split_cluster.h"

namespace resnet_fused {

// A cooperative launch of whole clusters. For an architecture without clusters it is empty, and no
// plan chooses it.
template <class T, class Tiles, LoadWidth kWidth>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    network_cluster_kernel(const __grid_constant__ NetworkArguments arguments) {
#if defined(RF_EMULATED) || defined(RF_SM90)
  walk_network<T, Tiles, kWidth, MergeByCluster>(arguments);
#endif
}

}  // namespace resnet_fused
