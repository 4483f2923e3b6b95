// The launch of a network in clusters for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/network_sm90.cuh"
#include "cooperative_clusters.h"
#include "network_arguments.h"

namespace resnet_fused {

template <class T>
int launch_network_cluster(const NetworkArguments& arguments, int32_t blocks, int32_t cluster,
                           void* stream) {
  return RF_LAUNCH_COOPERATIVE_CLUSTERS((network_cluster_kernel<T, ClusterTiles, LoadWidth::kWide>),
                                        dim3(static_cast<uint32_t>(blocks)),
                                        dim3(ClusterTiles::kThreads),
                                        dim3(static_cast<uint32_t>(cluster)), kClusterSharedBytes,
                                        static_cast<cudaStream_t>(stream), arguments);
}

}  // namespace resnet_fused
