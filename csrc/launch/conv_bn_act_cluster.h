// conv_bn_act for sm_90a by clusters that share a reduction: what its plan, its arguments and its
// launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "conv_bn_act_tma.h"
#include "conv_cluster_tiles.h"

namespace resnet_fused {

constexpr double kClusterBytes = 14;  // a cycle, from other blocks' shared memory: half of L2's

// index: in ConvClusterTiles.
TmaTileFacts cluster_tile(int index);

// "tma_cluster56x64_6s": pixels, channels, stages. Its blocks are the plan's splits.
std::string cluster_name(const TmaTileFacts& tile);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string cluster_fault(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images);
// Likewise of clusters of so many blocks.
std::string cluster_blocks_fault(const RfConvBnAct& problem, int64_t blocks);

// Predicted cycles of a launch over so many pixels by clusters of so many blocks.
double cluster_cost(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                    int64_t blocks, const RfGpu& gpu);

// Launches images [first, first + images); 0 or a cudaError_t.
int run_conv_bn_act_cluster(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                            int64_t images, void* stream);

// The launches of one dtype by clusters of so many blocks.
int launch_conv_bn_act_cluster_bfloat16(const ConvClusterArguments& arguments, int index,
                                        int32_t blocks, void* stream);
int launch_conv_bn_act_cluster_float16(const ConvClusterArguments& arguments, int index,
                                       int32_t blocks, void* stream);

}  // namespace resnet_fused
