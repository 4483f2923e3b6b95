// The workspace, strides and divisors of conv_bn_dgrad, and the launch of each part of the batch.
#include "conv_bn_dgrad_arguments.h"

#include "../device/warpgroup_shape.h"
#include "conv_bn_dgrad_tma.h"
#include "conv_bn_dgrad_window.h"
#include "conv_strides.h"
#include "window_request.h"

namespace resnet_fused {

BnDgradLayout bn_dgrad_layout(const RfConvBnDgrad& problem, const RfConvConfiguration& tile,
                              int32_t splits, int64_t images_a_launch, int sum_rows) {
  const RfConvGradient& conv = problem.conv;
  const PhaseSize phase = phase_size(conv);
  const int64_t phases = tile.tma != 0 ? static_cast<int64_t>(phases_of(conv).size())
                                       : conv.stride[0] * conv.stride[1];
  const int64_t channels = conv.x_size[1];
  const int64_t columns = divide_up(channels / conv.groups, tile.n) * conv.groups;
  const int64_t images = conv.x_size[0];
  const bool windows = tile.tma != 0 && tile.window != 0;  // whose tiles are of positions
  // By wgmma each of the warpgroups has a row of its own, or all of a tile.
  const int64_t rows_a_tile = tile.tma != 0 && !windows ? kConsumers : 1;
  const auto rows_of = [&](int64_t count) {
    const int64_t pixels = windows ? walk_positions(count, phase.rows, phase.columns)
                                   : count * phase.rows * phase.columns;
    return divide_up(pixels, tile.m) * rows_a_tile * phases;
  };
  const int64_t whole = (images - 1) / images_a_launch;  // launches ahead of the last one
  const int64_t rows = rows_of(images_a_launch);

  BnDgradLayout layout{};
  layout.all = {narrowed(whole * rows + rows_of(images - whole * images_a_launch))};
  layout.rows_a_launch = narrowed(rows);
  const int64_t chunks = layout.all.count();
  const int64_t tiles = rows * columns;
  const auto aligned = [](int64_t bytes) {
    return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
  };
  layout.arrivals = splits > 1 ? arrival_bytes(tiles) : 0;
  layout.counted = layout.arrivals;
  layout.partial = layout.arrivals;
  if (problem.reduced != 0) {
    layout.counted += arrival_bytes(columns * (chunks + 1));
    layout.sums = layout.counted;
    layout.merged =
        layout.sums + aligned(layout.all.tiles * channels * int64_t{sizeof(GradientSums)});
    const int64_t of_chunks =
        chunks > 1 ? aligned(chunks * channels * int64_t{sizeof(ColumnSums)}) : 0;
    layout.partial = layout.merged + of_chunks;
    if (sum_rows == kProjectedSumRows) {
      layout.third = layout.partial;
      layout.thirds_merged =
          layout.third + aligned(layout.all.tiles * channels * int64_t{sizeof(float)});
      layout.partial = layout.thirds_merged + of_chunks;
    }
  }
  layout.bytes = layout.partial + (splits > 1 ? tiles * splits * tile.m * tile.n * 4 : 0);
  return layout;
}

GradientReduction gradient_reduction(const RfConvBnDgrad& problem, const BnDgradLayout& layout,
                                     const RfConvPlan& plan, void* workspace, int64_t first) {
  return {layout.all,
          narrowed(first / plan.images_a_launch * layout.rows_a_launch),
          problem.conv.x_size[1],
          static_cast<uint32_t*>(moved(workspace, layout.arrivals)),
          static_cast<GradientSums*>(moved(workspace, layout.sums)),
          static_cast<ColumnSums*>(moved(workspace, layout.merged)),
          static_cast<float*>(problem.sums)};
}

ThirdSums third_sums(const BnDgradLayout& layout, void* workspace) {
  return {static_cast<float*>(moved(workspace, layout.third)),
          static_cast<ColumnSums*>(moved(workspace, layout.thirds_merged))};
}

ConvBnDgradArguments conv_bn_dgrad_arguments(const RfConvBnDgrad& problem, const RfConvPlan& plan,
                                             const RfConvConfiguration& tile,
                                             const BnDgradLayout& layout, void* workspace,
                                             int64_t first, int64_t images) {
  const RfConvGradient& conv = problem.conv;
  const int64_t bytes = bytes_of(conv.dtype);
  const int64_t channels = conv.weight_size[1];

  ConvBnDgradArguments arguments{};
  arguments.conv = conv_dgrad_arguments(conv, plan, tile, workspace, first, images);
  if (plan.splits > 1) {
    arguments.conv.workspace.partial = static_cast<float*>(moved(workspace, layout.partial));
  }
  if (problem.affine == 0) arguments.conv.y = nullptr;
  bool& wide = arguments.conv.wide_dx;
  if (problem.added != 0) {
    const int64_t step = problem.addend_step;
    const int64_t size[4] = {conv.x_size[0], conv.x_size[1], divide_up(conv.x_size[2], step),
                             divide_up(conv.x_size[3], step)};
    const Strides addend = used(size, problem.addend_stride);
    arguments.addend = moved(problem.addend, first * addend.n * bytes);
    arguments.addend_strides = addend.of_pixels();
    arguments.addend_step = make_divisor(narrowed(step));
    wide = wide && is_wide(problem.addend, addend, channels, bytes);
  }
  arguments.counters = workspace;
  arguments.cleared_bytes = first == 0 ? layout.counted : 0;
  if (problem.reduced == 0) return arguments;
  const Strides raw = used(conv.x_size, problem.raw_stride);
  arguments.raw = moved(problem.raw, first * raw.n * bytes);
  arguments.raw_strides = raw.of_pixels();
  arguments.norm = static_cast<const float*>(problem.norm);
  wide = wide && is_wide(problem.raw, raw, channels, bytes) && is_aligned(problem.norm);
  arguments.reduction = gradient_reduction(problem, layout, plan, workspace, first);
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_conv_bn_dgrad_cuda(const RfConvBnDgrad* problem, const RfConvPlan* plan,
                                     void* workspace, void* stream) {
  using namespace resnet_fused;
  constexpr Launches<ConvBnDgradArguments> kLaunches{
      launch_conv_bn_dgrad_bfloat16, launch_conv_bn_dgrad_float16, launch_conv_bn_dgrad_float32};
  const RfConvConfiguration& tile = *rf_conv_bn_dgrad_configuration(plan->configuration);
  return launch_parts(*plan, problem->conv.x_size[0], [&](int64_t first, int64_t count) {
    if (tile.tma != 0) {
      const auto run = tile.window != 0 ? run_conv_bn_dgrad_window : run_conv_bn_dgrad_tma;
      return run(*problem, *plan, workspace, first, count, stream);
    }
    const BnDgradLayout layout =
        bn_dgrad_layout(*problem, tile, plan->splits, plan->images_a_launch);
    return kLaunches(
        problem->conv.dtype,
        conv_bn_dgrad_arguments(*problem, *plan, tile, layout, workspace, first, count),
        plan->configuration, stream);
  });
}
