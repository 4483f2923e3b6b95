// The launches of conv_bn_act by clusters for sm_90a, for one dtype; each dtype's .cu file makes
// its own.
#pragma once

#include "../kernels/conv_bn_act_cluster_sm90.cuh"
#include "conv_bn_act_cluster.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_act_cluster(const ConvClusterArguments& arguments, int index, int32_t blocks,
                               void* stream) {
  return ConvClusterTiles::with(index, [&]<class Shape>() -> int {
    return with_cluster(blocks, [&]<int kBlocks>() -> int {
      const auto grid = static_cast<uint32_t>(arguments.conv.tiles.count) * kBlocks;
      return RF_LAUNCH_CLUSTERS_EARLY(arguments.conv.follows,
                                      (conv_bn_act_cluster_kernel<T, Shape, kBlocks>), dim3(grid),
                                      dim3(kClusterThreads), dim3(kBlocks), Shape::kSharedBytes,
                                      static_cast<cudaStream_t>(stream), arguments);
    });
  });
}

}  // namespace resnet_fused
