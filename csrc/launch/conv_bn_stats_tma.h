// conv_bn_stats for sm_90a: what its plan, its arguments and its launches share. Inside of this
// room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/stats_walk.h"
#include "conv_bn_act_tma.h"
#include "conv_bn_stats.h"
#include "conv_bn_stats_tma_tiles.h"

namespace resnet_fused {

// index: in StatsTmaTiles.
TmaTileFacts stats_tma_tile(int index);

// What keeps a problem from TMA, with the argument's name; empty if nothing does.
std::string stats_tma_fault(const RfConvBnStats& problem, const TmaTileFacts& tile);

// The blocks of a launch, whole clusters: as many for each tile of channels, so that a block keeps
// to its own.
int64_t stats_tma_blocks(const RfConvBnStats& problem, const TmaTileFacts& tile, const RfGpu& gpu);

// Predicted cycles of the launch.
double stats_tma_cost(const RfConvBnStats& problem, const TmaTileFacts& tile, const RfGpu& gpu);

int64_t stats_tma_bytes(const RfConvBnStats& problem, const TmaTileFacts& tile, int64_t blocks);

// What a launch of all of the batch is told; 0 or a cudaError_t. made: zeros.
int stats_tma_arguments(const RfConvBnStats& problem, const RfConvPlan& plan,
                        const TmaTileFacts& tile, void* workspace, ConvStatsTmaArguments* made);

// Launches all of the batch; 0 or a cudaError_t.
int run_conv_bn_stats_tma(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                          void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_conv_bn_stats_tma_bfloat16(const ConvStatsTmaArguments& arguments, int index,
                                      int32_t blocks, void* stream);
int launch_conv_bn_stats_tma_float16(const ConvStatsTmaArguments& arguments, int index,
                                     int32_t blocks, void* stream);

}  // namespace resnet_fused
