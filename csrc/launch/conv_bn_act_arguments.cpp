// Strides, origins and divisors of a launch, and the launch of each part of the batch.
#include "conv_bn_act_arguments.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "conv_bn_act_cluster.h"
#include "conv_bn_act_tf32.h"
#include "conv_bn_act_tma.h"
#include "conv_bn_act_window.h"
#include "conv_strides.h"

namespace resnet_fused {

// tools/_cuda_early.py knows the pointers of a kernel's parameters by these places.
static_assert(offsetof(ConvBnActArguments, operands.x) == 0);
static_assert(offsetof(ConvBnActArguments, operands.weight) == 8);
static_assert(offsetof(ConvBnActArguments, workspace.partial) == 232);
static_assert(offsetof(ConvBnActArguments, workspace.arrivals) == 240);
static_assert(offsetof(ConvBnActArguments, output.out) == 256);
static_assert(offsetof(ConvBnActArguments, output.residual) == 264);
static_assert(offsetof(ConvBnActArguments, output.scale) == 272);
static_assert(offsetof(ConvBnActArguments, output.shift) == 280);

namespace {

ConvOutput conv_output(const RfConvBnAct& problem, const OutputSize& size, int64_t first) {
  const int64_t bytes = bytes_of(problem.dtype);
  const int64_t filters = problem.weight_size[0];
  const int64_t group = filters / problem.groups;
  const int64_t shape[4] = {problem.x_size[0], filters, size.p, size.q};
  const Strides out = used(shape, problem.out_stride);
  const Strides residual = used(shape, problem.residual_stride);
  ConvOutput output{};
  output.out = moved(problem.out, first * out.n * bytes);
  output.residual = moved(problem.residual, first * residual.n * bytes);
  output.scale = static_cast<const float*>(problem.scale);
  output.shift = static_cast<const float*>(problem.shift);
  output.out_strides = {out.n, out.c, out.h, out.w};
  output.residual_strides = {residual.n, residual.c, residual.h, residual.w};
  output.channels = narrowed(group);
  output.floor = problem.relu != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
  output.wide_out = is_wide(problem.out, out, group, bytes);
  output.wide_residual =
      problem.residual != nullptr && is_wide(problem.residual, residual, group, bytes);
  output.pixels_lie_together = out.c > out.w;
  return output;
}

}  // namespace

ConvBnActArguments conv_bn_act_arguments(const RfConvBnAct& problem, const RfConvPlan& plan,
                                         void* workspace, int64_t first, int64_t images) {
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(plan.configuration);
  const int64_t bytes = bytes_of(problem.dtype);
  const OutputSize size = output_size(problem);
  const int64_t pixels = images * size.p * size.q;
  const int64_t group = problem.weight_size[0] / problem.groups;

  ConvBnActArguments arguments{};
  arguments.operands = conv_operands(problem, tile.wide != 0, first, images);
  const int64_t depth = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
  arguments.steps = narrowed(divide_up(depth * bytes, tile.step_bytes));
  arguments.steps_each = narrowed(divide_up(arguments.steps, plan.splits));
  arguments.tiles = {narrowed(divide_up(pixels, tile.m)), narrowed(divide_up(group, tile.n)),
                     problem.groups, plan.splits};
  const int64_t tiles = int64_t{arguments.tiles.tiles_m} * arguments.tiles.tiles_n * problem.groups;
  if (plan.splits > 1) {
    arguments.workspace.zero = problem.arrivals != nullptr && tiles <= problem.arrivals_count;
    arguments.workspace.arrivals =
        arguments.workspace.zero ? problem.arrivals : static_cast<uint32_t*>(workspace);
    arguments.workspace.partial = static_cast<float*>(moved(workspace, arrival_bytes(tiles)));
  }
  arguments.output = conv_output(problem, size, first);
  arguments.reverse = problem.reverse != 0;
  arguments.dependent = problem.flow.dependent != 0;
  // Behind the clearing of its counters a kernel follows no other.
  arguments.follows = problem.flow.follows != 0 && (plan.splits == 1 || arguments.workspace.zero);
  if (arguments.follows && plan.at_once != 0) {
    arguments.prefetch_bytes = dense_bytes(problem.weight_size, problem.weight_stride, bytes);
  }
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_conv_bn_act_cuda(const RfConvBnAct* problem, const RfConvPlan* plan,
                                   void* workspace, void* stream) {
  using namespace resnet_fused;
  const OutputSize size = output_size(*problem);
  const int64_t images = problem->x_size[0];
  if (images * problem->weight_size[0] * size.p * size.q == 0) return 0;
  constexpr Launches<ConvBnActArguments> kLaunches{
      launch_conv_bn_act_bfloat16, launch_conv_bn_act_float16, launch_conv_bn_act_float32};
  const int64_t launches = (images + plan->images_a_launch - 1) / plan->images_a_launch;
  RfConvBnAct part = *problem;
  const RfConvConfiguration& tile = *rf_conv_bn_act_configuration(plan->configuration);
  for (int64_t i = 0; i < launches; ++i) {
    const int64_t first = (problem->reverse != 0 ? launches - 1 - i : i) * plan->images_a_launch;
    const int64_t count = std::min(plan->images_a_launch, images - first);
    const int error =
        tile.window != 0    ? run_conv_bn_act_window(part, *plan, first, count, stream)
        : tile.cluster != 0 ? run_conv_bn_act_cluster(part, *plan, first, count, stream)
        : tile.tma != 0 && tile.float32 != 0
            ? run_conv_bn_act_tf32(part, *plan, first, count, stream)
        : tile.tma != 0
            ? run_conv_bn_act_tma(part, *plan, first, count, stream)
            : kLaunches(problem->dtype, conv_bn_act_arguments(part, *plan, workspace, first, count),
                        plan->configuration, stream);
    if (error != 0) return error;
    part.flow.follows = part.flow.dependent;
  }
  return 0;
}
