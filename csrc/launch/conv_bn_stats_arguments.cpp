// The workspace, strides and divisors of conv_bn_stats.
#include "conv_bn_stats_arguments.h"

#include <algorithm>

#include "conv_strides.h"
#include "stats_norm.h"

namespace resnet_fused {

bool stats_read_wide(const RfConvBnStats& problem) {
  return reads_wide(problem.conv) && is_aligned(problem.norm);
}

StatsLayout stats_layout(const RfConvBnStats& problem, const RfConvConfiguration& tile,
                         int32_t splits, int64_t images_a_launch) {
  const RfConvBnAct& conv = problem.conv;
  const OutputSize size = output_size(conv);
  const int64_t filters = conv.weight_size[0];
  const int64_t columns = divide_up(filters / conv.groups, tile.n) * conv.groups;
  const int64_t of_image = size.p * size.q;
  const int64_t launches = divide_up(conv.x_size[0], images_a_launch);
  const int64_t of_launch = images_a_launch * of_image;
  const int64_t pixels = conv.x_size[0] * of_image;
  const int64_t tiles_a_launch = divide_up(of_launch, tile.m);
  const int64_t last = divide_up(pixels - (launches - 1) * of_launch, tile.m);

  StatsLayout layout{};
  layout.measured = {
      pixels, of_launch, narrowed(tiles_a_launch), narrowed((launches - 1) * tiles_a_launch + last),
      0,      tile.m};
  const int64_t chunks = TileChunks{layout.measured.tiles}.count();
  const auto aligned = [](int64_t bytes) {
    return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
  };
  const int64_t tiles = tiles_a_launch * columns;
  layout.arrivals = splits > 1 ? arrival_bytes(tiles) : 0;
  const int64_t counters = columns * (chunks + 1);
  layout.ended = layout.arrivals + counters * int64_t{sizeof(uint32_t)};
  layout.columns = columns;
  layout.counted = layout.arrivals + arrival_bytes(counters + 1);
  layout.moments = layout.counted;
  layout.merged =
      layout.moments + aligned(int64_t{layout.measured.tiles} * filters * int64_t{sizeof(Moments)});
  layout.partial =
      layout.merged + (chunks > 1 ? aligned(chunks * filters * int64_t{sizeof(WideMoments)}) : 0);
  layout.bytes = layout.partial + (splits > 1 ? tiles * splits * tile.m * tile.n * 4 : 0);
  return layout;
}

ConvBnStatsArguments conv_bn_stats_arguments(const RfConvBnStats& problem,
                                             const RfConvConfiguration& tile,
                                             const RfConvPlan& plan, void* workspace, int64_t first,
                                             int64_t images) {
  const RfConvBnAct& conv = problem.conv;
  const int64_t bytes = bytes_of(conv.dtype);
  const OutputSize size = output_size(conv);
  const int64_t filters = conv.weight_size[0];
  const int64_t group = filters / conv.groups;
  const int64_t shape[4] = {conv.x_size[0], filters, size.p, size.q};
  const Strides y = used(shape, conv.out_stride);
  const StatsLayout layout = stats_layout(problem, tile, plan.splits, plan.images_a_launch);

  ConvBnStatsArguments arguments{};
  arguments.operands = conv_operands(conv, tile.wide != 0, first, images);
  // In windows a step has all taps.
  const int64_t taps = tile.window == 0 ? conv.weight_size[2] * conv.weight_size[3] : 1;
  const int64_t depth = conv.weight_size[1] * taps;
  arguments.steps = narrowed(divide_up(depth * bytes, tile.step_bytes));
  arguments.steps_each = narrowed(divide_up(arguments.steps, plan.splits));
  arguments.tiles = {narrowed(divide_up(images * size.p * size.q, tile.m)),
                     narrowed(divide_up(group, tile.n)), conv.groups, plan.splits};
  if (tile.image != 0) {
    const int64_t walkers = plan.blocks / arguments.tiles.tiles_n;
    arguments.walkers = std::min(arguments.tiles.tiles_m, narrowed(walkers));
  }
  if (plan.splits > 1) {
    arguments.workspace.arrivals = static_cast<uint32_t*>(workspace);
    arguments.workspace.partial = static_cast<float*>(moved(workspace, layout.partial));
  }
  if (problem.normed != 0) {
    arguments.scale = static_cast<const float*>(problem.norm);
    arguments.shift = arguments.scale + conv.x_size[1];
  }
  arguments.y = moved(conv.out, first * y.n * bytes);
  arguments.y_strides = y.of_pixels();
  arguments.channels = narrowed(group);
  arguments.wide_y = is_wide(conv.out, y, group, bytes);
  arguments.pixels_lie_together = y.c > y.w;
  arguments.measured = layout.measured;
  arguments.measured.first_tile =
      narrowed(first / plan.images_a_launch * layout.measured.tiles_a_launch);
  arguments.arrivals = static_cast<uint32_t*>(moved(workspace, layout.arrivals));
  arguments.counters = workspace;
  arguments.cleared_bytes = first == 0 ? layout.counted : 0;
  arguments.moments = static_cast<Moments*>(moved(workspace, layout.moments));
  arguments.merged = static_cast<WideMoments*>(moved(workspace, layout.merged));
  arguments.stats = static_cast<float*>(problem.stats);
  arguments.finalized = stats_norm(problem, moved(workspace, layout.ended), layout.columns);
  return arguments;
}

}  // namespace resnet_fused
