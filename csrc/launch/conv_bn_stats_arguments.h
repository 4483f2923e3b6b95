// From a problem of conv_bn_stats and its plan to what the kernel is told. Pure functions, inside
// of this room.
#pragma once

#include <cstdint>

#include "../device/stats_geometry.h"
#include "conv_bn_act_arguments.h"
#include "conv_bn_stats.h"

namespace resnet_fused {

// Whether everything that is read can be read 16 bytes at a time.
bool stats_read_wide(const RfConvBnStats& problem);

// The workspace of a plan: where in it what lies, in bytes.
struct StatsLayout {
  PixelTiles measured;  // of all launches
  int64_t arrivals;     // counters of the statistics, behind those of the splits
  int64_t ended;        // one that counts the columns of tiles whose statistics are merged
  int64_t columns;      // of tiles, over all groups
  int64_t counted;      // the end of all counters: so much is cleared ahead of the first launch
  int64_t moments;      // of the tiles
  int64_t merged;       // of the chunks
  int64_t partial;      // of the splits
  int64_t bytes;
};
StatsLayout stats_layout(const RfConvBnStats& problem, const RfConvConfiguration& tile,
                         int32_t splits, int64_t images_a_launch);

// The arguments for images [first, first + images), which begin a launch of the plan's, by a tile
// of conv_bn_stats or of bn_add_act_conv_stats.
ConvBnStatsArguments conv_bn_stats_arguments(const RfConvBnStats& problem,
                                             const RfConvConfiguration& tile,
                                             const RfConvPlan& plan, void* workspace, int64_t first,
                                             int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_stats_bfloat16(const ConvBnStatsArguments& arguments, int configuration,
                                  void* stream);
int launch_conv_bn_stats_float16(const ConvBnStatsArguments& arguments, int configuration,
                                 void* stream);
int launch_conv_bn_stats_float32(const ConvBnStatsArguments& arguments, int configuration,
                                 void* stream);

}  // namespace resnet_fused
