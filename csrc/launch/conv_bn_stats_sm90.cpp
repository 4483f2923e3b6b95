// The kernels of conv_bn_stats for sm_90a.
#include "conv_bn_stats_sm90.h"

#include <iterator>

#include "conv_bn_stats_stationary.h"
#include "conv_bn_stats_stem.h"
#include "conv_bn_stats_tma.h"
#include "conv_bn_stats_window.h"

namespace resnet_fused {
namespace {

RfConvPlan tma_plan(const RfConvBnStats& problem, int index, const RfGpu& gpu) {
  const TmaTileFacts tile = stats_tma_tile(index);
  const int64_t blocks = stats_tma_blocks(problem, tile, gpu);
  return {0,
          1,
          stats_tma_bytes(problem, tile, blocks),
          1,
          problem.conv.x_size[0],
          blocks,
          stats_tma_cost(problem, tile, gpu)};
}

constexpr StatsSm90Kernel kKernels[] = {
    {kFirstStatsTma, [](int i) { return tma_name(stats_tma_tile(i)); },
     [](int i) { return tma_configuration(stats_tma_tile(i)); },
     [](const RfConvBnStats& problem, int i) {
       return stats_tma_fault(problem, stats_tma_tile(i));
     },
     tma_plan, run_conv_bn_stats_tma, true},
    {kFirstStatsWindow, [](int i) { return window_name(stats_window_tile(i)); },
     [](int i) { return window_configuration(stats_window_tile(i)); },
     [](const RfConvBnStats& problem, int i) {
       return stats_window_fault(problem, stats_window_tile(i));
     },
     [](const RfConvBnStats& problem, int i, const RfGpu& gpu) {
       return stats_window_plan(problem, stats_window_tile(i), gpu);
     },
     run_conv_bn_stats_window, false},
    {kFirstStatsStem, stats_stem_name, stats_stem_configuration, stats_stem_fault, stats_stem_plan,
     run_conv_bn_stats_stem, false},
    {kFirstStatsStationary, [](int i) { return stats_stationary_name(stats_stationary_tile(i)); },
     [](int i) { return tma_configuration(stats_stationary_tile(i)); },
     [](const RfConvBnStats& problem, int i) {
       return stats_stationary_fault(problem, stats_stationary_tile(i));
     },
     [](const RfConvBnStats& problem, int i, const RfGpu& gpu) {
       return stats_stationary_plan(problem, stats_stationary_tile(i), gpu);
     },
     run_conv_bn_stats_stationary, false},
};

}  // namespace

const StatsSm90Kernel& stats_sm90_kernel(int index) {
  const StatsSm90Kernel* found = std::begin(kKernels);
  for (const StatsSm90Kernel& kernel : kKernels) {
    if (kernel.first <= index) found = &kernel;
  }
  return *found;
}

}  // namespace resnet_fused
