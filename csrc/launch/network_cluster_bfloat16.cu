#include "network_cluster_launch.cuh"

int resnet_fused::launch_network_cluster_bfloat16(const NetworkArguments& arguments, int32_t blocks,
                                                  int32_t cluster, void* stream) {
  return launch_network_cluster<BFloat16>(arguments, blocks, cluster, stream);
}

#if !defined(RF_EMULATED)
// Both dtypes' kernels take the same room.
extern "C" int rf_network_clusters(int32_t cluster, int32_t* clusters) {
  using namespace resnet_fused;
  return most_clusters(network_cluster_kernel<BFloat16, ClusterTiles, LoadWidth::kWide>,
                       dim3(ClusterTiles::kThreads), dim3(static_cast<uint32_t>(cluster)),
                       kClusterSharedBytes, clusters);
}

extern "C" int rf_gpu_clusters(int32_t cluster, int32_t shared_bytes, int32_t* clusters) {
  using namespace resnet_fused;
  return most_clusters(network_cluster_kernel<BFloat16, ClusterTiles, LoadWidth::kWide>,
                       dim3(ClusterTiles::kThreads), dim3(static_cast<uint32_t>(cluster)),
                       static_cast<uint32_t>(shared_bytes), clusters);
}
#endif
