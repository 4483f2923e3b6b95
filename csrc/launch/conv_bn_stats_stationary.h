// conv_bn_stats for sm_90a with filters that stay: what its plan and its launches share. Inside of
// this room.
#pragma once

#include <cstdint>
#include <string>

#include "conv_bn_stats_stationary_tiles.h"
#include "conv_bn_stats_tma.h"

namespace resnet_fused {

struct StationaryTileFacts : TmaTileFacts {
  int32_t steps;  // of a tile, at most
};
// index: in StatsStationaryTiles.
StationaryTileFacts stats_stationary_tile(int index);

// "tma_stay128x128_8s": pixels, channels, stages.
std::string stats_stationary_name(const StationaryTileFacts& tile);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string stats_stationary_fault(const RfConvBnStats& problem, const StationaryTileFacts& tile);

// The one launch that takes all of the batch, but for the configuration's index.
RfConvPlan stats_stationary_plan(const RfConvBnStats& problem, const StationaryTileFacts& tile,
                                 const RfGpu& gpu);

// Launches it; 0 or a cudaError_t.
int run_conv_bn_stats_stationary(const RfConvBnStats& problem, const RfConvPlan& plan,
                                 void* workspace, void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_conv_bn_stats_stationary_bfloat16(const ConvStatsTmaArguments& arguments, int index,
                                             int32_t blocks, void* stream);
int launch_conv_bn_stats_stationary_float16(const ConvStatsTmaArguments& arguments, int index,
                                            int32_t blocks, void* stream);

}  // namespace resnet_fused
