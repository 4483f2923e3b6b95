// The kernels of conv_bn_stats for sm_90a, as its table of configurations has them one behind the
// other: what each kernel's configurations are called, serve, take, and how they are launched.
// Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "conv_bn_stats.h"
#include "conv_bn_stats_stationary_tiles.h"

namespace resnet_fused {

// Of one kernel; index: of its own configurations.
struct StatsSm90Kernel {
  int first;  // in the table
  std::string (*name)(int index);
  RfConvConfiguration (*configuration)(int index);
  // What keeps a problem from it, with the argument's name; empty if nothing does.
  std::string (*fault)(const RfConvBnStats& problem, int index);
  // The one launch that takes all of the batch, but for the configuration.
  RfConvPlan (*plan)(const RfConvBnStats& problem, int index, const RfGpu& gpu);
  int (*run)(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace, void* stream);
  bool general;  // for layers of every kind: what keeps one from it is worth saying
};

constexpr int kFirstStatsSm90 = kFirstStatsTma;
constexpr int kStatsConfigurations = kFirstStatsStationary + StatsStationaryTiles::kSize;

// index: in the table, of kFirstStatsSm90 and those behind it.
const StatsSm90Kernel& stats_sm90_kernel(int index);

}  // namespace resnet_fused
