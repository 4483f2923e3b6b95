// The launch of conv_bn_stats, of each part of the batch.
#include "conv_bn_stats.h"

#include <algorithm>

#include "conv_bn_stats_arguments.h"
#include "conv_bn_stats_sm90.h"

extern "C" int rf_conv_bn_stats_cuda(const RfConvBnStats* problem, const RfConvPlan* plan,
                                     void* workspace, void* stream) {
  using namespace resnet_fused;
  constexpr Launches<ConvBnStatsArguments> kLaunches{
      launch_conv_bn_stats_bfloat16, launch_conv_bn_stats_float16, launch_conv_bn_stats_float32};
  const int64_t images = problem->conv.x_size[0];
  const RfConvConfiguration& tile = *rf_conv_bn_stats_configuration(plan->configuration);
  if (plan->launches > 0 && tile.tma != 0) {
    return stats_sm90_kernel(plan->configuration).run(*problem, *plan, workspace, stream);
  }
  for (int64_t i = 0; i < plan->launches; ++i) {
    const int64_t first = i * plan->images_a_launch;
    const int64_t count = std::min(plan->images_a_launch, images - first);
    const int error =
        kLaunches(problem->conv.dtype,
                  conv_bn_stats_arguments(*problem, tile, *plan, workspace, first, count),
                  plan->configuration, stream);
    if (error != 0) return error;
  }
  return 0;
}
