// How the operands of bn_add_act_conv_stats lie, and the launch of each part of the batch.
#include "bn_add_act_conv_stats_arguments.h"

#include <algorithm>

#include "bn_add_act_conv_stats_tma.h"
#include "pixel_rows.h"

namespace resnet_fused {

const char* askew(const RfBnAddActConvStats& problem) {
  const RfConvBnAct& conv = problem.stats.conv;
  const int64_t bytes = bytes_of(conv.dtype);
  const PixelRows all[] = {{"y", conv.x, conv.x_size, conv.x_stride},
                           {"residual", problem.residual, conv.x_size, problem.residual_stride},
                           {"out", problem.out, conv.x_size, problem.out_stride}};
  for (const PixelRows& rows : all) {
    if (!rows.readable(bytes)) return rows.name;
  }
  const Strides weight = used(conv.weight_size, conv.weight_stride);
  if (!is_wide(conv.weight, weight, conv.weight_size[1], bytes)) return "weight";
  if (!is_aligned(problem.stats.norm)) return "norm";
  if (problem.projected != 0 && !is_aligned(problem.residual_norm)) return "residual_norm";
  return nullptr;
}

BlockEndArguments bn_add_act_conv_stats_arguments(const RfBnAddActConvStats& problem,
                                                  const RfConvPlan& plan, void* workspace,
                                                  int64_t first, int64_t images) {
  const RfConvBnAct& conv = problem.stats.conv;
  const RfConvConfiguration& tile = *rf_bn_add_act_conv_stats_configuration(plan.configuration);
  const int64_t bytes = bytes_of(conv.dtype);
  const auto from = [&](auto* tensor, const int64_t (&stride)[4]) {
    return moved(tensor, first * used(conv.x_size, stride).n * bytes);
  };
  BlockEndArguments arguments{};
  arguments.stats = conv_bn_stats_arguments(problem.stats, tile, plan, workspace, first, images);
  arguments.shortcut = from(problem.residual, problem.residual_stride);
  arguments.out = from(problem.out, problem.out_stride);
  if (problem.projected != 0) {
    arguments.shortcut_scale = static_cast<const float*>(problem.residual_norm);
    arguments.shortcut_shift = arguments.shortcut_scale + conv.x_size[1];
  }
  arguments.raw_pixel = pixel_step(conv.x_size, conv.x_stride);
  arguments.shortcut_pixel = pixel_step(conv.x_size, problem.residual_stride);
  arguments.out_pixel = pixel_step(conv.x_size, problem.out_stride);
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_bn_add_act_conv_stats_cuda(const RfBnAddActConvStats* problem,
                                             const RfConvPlan* plan, void* workspace,
                                             void* stream) {
  using namespace resnet_fused;
  constexpr Launches<BlockEndArguments> kLaunches{launch_bn_add_act_conv_stats_bfloat16,
                                                  launch_bn_add_act_conv_stats_float16,
                                                  launch_bn_add_act_conv_stats_float32};
  if (plan->launches > 0 && plan->configuration >= kFirstBlockEndTma) {
    return run_bn_add_act_conv_stats_tma(*problem, *plan, workspace, stream);
  }
  const RfConvBnAct& conv = problem->stats.conv;
  for (int64_t i = 0; i < plan->launches; ++i) {
    const int64_t first = i * plan->images_a_launch;
    const int64_t count = std::min(plan->images_a_launch, conv.x_size[0] - first);
    const int error = kLaunches(
        conv.dtype, bn_add_act_conv_stats_arguments(*problem, *plan, workspace, first, count),
        plan->configuration, stream);
    if (error != 0) return error;
  }
  return 0;
}
