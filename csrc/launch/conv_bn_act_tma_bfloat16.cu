#include "conv_bn_act_tma_launch.cuh"
#include "cooperative_clusters.h"
#include "gpu.h"

int resnet_fused::launch_conv_bn_act_tma_bfloat16(const ConvTmaArguments& arguments, int index,
                                                  int32_t blocks, void* stream) {
  return launch_conv_bn_act_tma<BFloat16>(arguments, index, blocks, stream);
}

#if !defined(RF_EMULATED)
// Any kernel whose blocks have a multiprocessor each takes the same room.
extern "C" int rf_tma_clusters(int32_t cluster, int32_t* clusters) {
  using namespace resnet_fused;
  using Shape = ChannelsLeft<Consumers::kInTurns, 128, 64, 7, 2, 4>;
  static_assert(2 * Shape::kSharedBytes > kMostSharedBytes);
  return most_clusters(conv_bn_act_tma_kernel<BFloat16, Shape>, dim3(kWarpgroupBlockThreads),
                       dim3(static_cast<uint32_t>(cluster)), Shape::kSharedBytes, clusters);
}
#endif
