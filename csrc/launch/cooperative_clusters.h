// Launches in clusters of blocks that all are on the device at once, beside those of launch.h.
//
//   int error = RF_LAUNCH_COOPERATIVE_CLUSTERS(kernel, grid, block, cluster, shared_bytes, stream,
//                                              arguments...);
//   int error = most_clusters(kernel, block, cluster, shared_bytes, &clusters);
#pragma once

#include "launch.h"

// The grid is a multiple of the cluster, and no larger than what most_clusters gives; sm_90 and
// later.
#define RF_LAUNCH_COOPERATIVE_CLUSTERS(kernel, grid, block, cluster, shared_bytes, stream, ...)   \
  ::resnet_fused::launch_cooperative_clusters(kernel, grid, block, cluster, shared_bytes, stream, \
                                              __VA_ARGS__)

namespace resnet_fused {

#if defined(RF_EMULATED)

template <class... Parameters, class... Arguments>
int launch_cooperative_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster,
                                uint32_t shared_bytes, cudaStream_t /*stream*/,
                                const Arguments&... arguments) {
  emulator::launch_clusters(
      grid, block, cluster, shared_bytes, true, [&] { kernel(arguments...); }, false);
  return cudaSuccess;
}

#else

// What makes a launch one of clusters. Each block of a cluster has a multiprocessor to itself while
// there are enough: a layer with fewer parts than blocks keeps all busy.
struct ClusterAttributes {
  cudaLaunchAttribute all[3]{};

  explicit ClusterAttributes(dim3 cluster) {
    all[0].id = cudaLaunchAttributeClusterDimension;
    all[0].val.clusterDim.x = cluster.x;
    all[0].val.clusterDim.y = cluster.y;
    all[0].val.clusterDim.z = cluster.z;
    all[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    all[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
    all[2].id = cudaLaunchAttributeCooperative;
    all[2].val.cooperative = 1;
  }
};

template <class... Parameters, class... Arguments>
int launch_cooperative_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster,
                                uint32_t shared_bytes, cudaStream_t stream,
                                const Arguments&... arguments) {
  ClusterAttributes attributes(cluster);
  return launch_with(attributes.all, kernel, grid, block, shared_bytes, stream, arguments...);
}

// Clusters of a kernel that are on the current device at once: what its GPCs have room for, which
// differs from GPU to GPU of one kind. 0, or a cudaError_t.
template <class... Parameters>
int most_clusters(void (*kernel)(Parameters...), dim3 block, dim3 cluster, uint32_t shared_bytes,
                  int32_t* clusters) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  ClusterAttributes attributes(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = cluster;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes.all;
  config.numAttrs = 2;  // how many would fit is no question of whether they wait for one another
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

#endif

}  // namespace resnet_fused
