// bn_add_act_conv_stats for sm_90a: what its plan, its arguments and its launches share. Inside of
// this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/block_end_tma.h"
#include "bn_add_act_conv_stats.h"
#include "bn_add_act_conv_stats_tma_tiles.h"
#include "conv_bn_stats_tma.h"

namespace resnet_fused {

// index: in BlockEndTmaTiles.
TmaTileFacts block_end_tma_tile(int index);

// What keeps a problem from TMA, with the argument's name; empty if nothing does.
std::string block_end_tma_fault(const RfBnAddActConvStats& problem, const TmaTileFacts& tile);

// The one launch that takes all of the batch, but for the configuration.
RfConvPlan block_end_tma_plan(const RfBnAddActConvStats& problem, const TmaTileFacts& tile,
                              const RfGpu& gpu);

// Launches all of the batch; 0 or a cudaError_t.
int run_bn_add_act_conv_stats_tma(const RfBnAddActConvStats& problem, const RfConvPlan& plan,
                                  void* workspace, void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_bn_add_act_conv_stats_tma_bfloat16(const BlockEndTmaArguments& arguments, int index,
                                              int32_t blocks, void* stream);
int launch_bn_add_act_conv_stats_tma_float16(const BlockEndTmaArguments& arguments, int index,
                                             int32_t blocks, void* stream);

}  // namespace resnet_fused
