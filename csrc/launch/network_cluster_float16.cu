#include "network_cluster_launch.cuh"

int resnet_fused::launch_network_cluster_float16(const NetworkArguments& arguments, int32_t blocks,
                                                 int32_t cluster, void* stream) {
  return launch_network_cluster<Float16>(arguments, blocks, cluster, stream);
}
