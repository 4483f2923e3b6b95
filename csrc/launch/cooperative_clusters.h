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

template <class... Parameters, class... Arguments>
int launch_cooperative_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster,
                                uint32_t shared_bytes, cudaStream_t stream,
                                const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster.x;
  attributes[0].val.clusterDim.y = cluster.y;
  attributes[0].val.clusterDim.z = cluster.z;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  return launch_with(attributes, kernel, grid, block, shared_bytes, stream, arguments...);
}

// Clusters of a kernel that are on the current device at once: what its GPCs have room for, which
// differs from GPU to GPU of one kind. 0, or a cudaError_t.
template <class... Parameters>
int most_clusters(void (*kernel)(Parameters...), dim3 block, dim3 cluster, uint32_t shared_bytes,
                  int32_t* clusters) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[1]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster.x;
  attributes[0].val.clusterDim.y = cluster.y;
  attributes[0].val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = cluster;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

#endif

}  // namespace resnet_fused
