// conv_bn_stats by windows for sm_90a: what its plan, its arguments and its launches share. Inside
// of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/window_stats.h"
#include "conv_bn_act_window.h"
#include "conv_bn_stats.h"
#include "conv_bn_stats_stream_tiles.h"

namespace resnet_fused {

// index: in StatsWindowTiles, or behind those in StatsStreamTiles.
WindowTileFacts stats_window_tile(int index);

// What keeps a problem from windows, with the argument's name; empty if nothing does.
std::string stats_window_fault(const RfConvBnStats& problem, const WindowTileFacts& tile);

// The one launch that takes all of the batch, but for the configuration's index.
RfConvPlan stats_window_plan(const RfConvBnStats& problem, const WindowTileFacts& tile,
                             const RfGpu& gpu);

// Launches it; 0 or a cudaError_t.
int run_conv_bn_stats_window(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                             void* stream);

// The launches of one dtype.
int launch_conv_bn_stats_window_bfloat16(const ConvStatsWindowArguments& arguments, int index,
                                         const WindowGrid& grid, void* stream);
int launch_conv_bn_stats_window_float16(const ConvStatsWindowArguments& arguments, int index,
                                        const WindowGrid& grid, void* stream);
// Of channels in slices; index: in StatsStreamTiles.
int launch_conv_bn_stats_stream_bfloat16(const ConvStatsWindowArguments& arguments, int index,
                                         const WindowGrid& grid, void* stream);
int launch_conv_bn_stats_stream_float16(const ConvStatsWindowArguments& arguments, int index,
                                        const WindowGrid& grid, void* stream);

}  // namespace resnet_fused
