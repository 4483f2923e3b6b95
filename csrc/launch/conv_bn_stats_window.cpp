// conv_bn_stats by windows for sm_90a: from a problem to its arguments, its prediction, and its
// launch. None of the rates has been measured by this project on a GPU; only their proportions
// matter.
#include "conv_bn_stats_window.h"

#include <cstddef>

#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "stats_parts.h"
#include "step_transform.h"
#include "tma_request.h"
#include "window_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvStatsWindowArguments, conv) == 0);
static_assert(offsetof(ConvStatsWindowArguments, norm) == 512);
static_assert(offsetof(ConvStatsWindowArguments, arrivals) == 584);
static_assert(offsetof(ConvStatsWindowArguments, stats) == 608);

namespace {

int64_t all_positions(const RfConvBnAct& conv) { return window_positions(conv, conv.x_size[0]); }

// Of a launch by so many blocks.
WindowRuns runs_of(const RfConvBnAct& conv, const WindowTileFacts& tile, int64_t blocks) {
  const int64_t positions = all_positions(conv);
  return {{narrowed(positions), make_divisor(narrowed(conv.x_size[3] + 1)),
           make_divisor(narrowed(conv.x_size[2] + 1))},
          tile.pixels,
          narrowed(divide_up(positions, tile.pixels)),
          narrowed(blocks / (conv.weight_size[0] / kWarpgroupRows) * kConsumers)};
}

StatsParts parts_of(const RfConvBnAct& conv, const WindowRuns& runs) {
  return stats_parts(runs.count(), conv.weight_size[0], conv.groups);
}

// A convolution's, of which a tile's results are measured, too. Then parts are stored, merged in
// chunks, and chunks are.
double cost(const RfConvBnStats& problem, const WindowTileFacts& tile, const RfGpu& gpu) {
  const RfConvBnAct& conv = problem.conv;
  WindowWork work{};
  work.results = tile.pixels * kWarpgroupRows * kMeasureInstructions / kInstructions;
  if (problem.normed != 0) {
    const WindowParts parts = window_parts(tile.pixels, conv.x_size[3]);
    const auto elements = static_cast<double>(parts.rows * parts.count * kWindowChannels);
    work.transformed = 2 * elements * kTmaElementBytes;
    work.transforming = elements * kTransformInstructions / kTransformInstructionsACycle;
  }
  const double chunk = kChunkTiles * kWarpgroupRows * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting +
         window_cost(conv, element_of(conv.dtype), tile, all_positions(conv), gpu, work) + chunk +
         4 * kLatency;
}

}  // namespace

WindowTileFacts stats_window_tile(int index) {
  const auto facts = []<class Shape>() { return window_facts<Shape>(); };
  return index < StatsWindowTiles::kSize
             ? StatsWindowTiles::with(index, facts)
             : StatsStreamTiles::with(index - StatsWindowTiles::kSize, facts);
}

std::string stats_window_fault(const RfConvBnStats& problem, const WindowTileFacts& tile) {
  const RfConvBnAct& conv = problem.conv;
  std::string found = window_fault(conv, element_of(conv.dtype), tile, conv.x_size[0]);
  if (!found.empty()) return found;
  if (problem.normed != 0 && !is_aligned(problem.norm)) {
    return "norm: address is not a multiple of 16";
  }
  // Between two images' pixels lie a row of positions and one more: a tile has a pixel to measure.
  const int64_t width = conv.x_size[3];
  if (tile.pixels <= width + 2) {
    return "x: rows of " + std::to_string(width) + " pixels; a tile of " +
           std::to_string(tile.pixels) + " positions might hold none";
  }
  const WindowParts parts = window_parts(tile.pixels, width);
  if (all_positions(conv) > kMost - parts.rows * parts.count) {
    return "batch: more pixels than a launch counts, and statistics meet in one";
  }
  return "";
}

RfConvPlan stats_window_plan(const RfConvBnStats& problem, const WindowTileFacts& tile,
                             const RfGpu& gpu) {
  const RfConvBnAct& conv = problem.conv;
  RfConvPlan plan{};
  plan.splits = 1;
  plan.launches = 1;
  plan.images_a_launch = conv.x_size[0];
  plan.blocks = window_blocks(conv, tile, all_positions(conv), gpu);
  plan.workspace_bytes = parts_of(conv, runs_of(conv, tile, plan.blocks)).bytes;
  plan.cycles = cost(problem, tile, gpu);
  return plan;
}

int run_conv_bn_stats_window(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                             void* stream) {
  const RfConvBnAct& conv = problem.conv;
  const int index = plan.configuration - kFirstStatsWindow;
  const WindowTileFacts tile = stats_window_tile(index);
  const TensorElement element = element_of(conv.dtype);
  ConvStatsWindowArguments made{};
  const int error = window_arguments(conv, element, tile, 0, conv.x_size[0], &made.conv);
  if (error != 0) return error;
  const WindowGrid grid = window_grid(made.conv, tile, plan);
  if (problem.normed != 0) {
    const auto* scale = static_cast<const float*>(problem.norm);
    made.norm = {scale, scale + conv.x_size[1], narrowed(conv.x_size[2]), narrowed(conv.x_size[3])};
  }
  made.measured = runs_of(conv, tile, plan.blocks);
  made.channels = narrowed(conv.weight_size[0]);
  made.slices = narrowed(conv.x_size[1] / kWindowChannels);
  place_parts(parts_of(conv, made.measured), problem, workspace, &made);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = element == TensorElement::kFloat16;
  if (tile.filter_stages > 0) {
    const auto launch =
        half ? launch_conv_bn_stats_stream_float16 : launch_conv_bn_stats_stream_bfloat16;
    return launch(made, index - StatsWindowTiles::kSize, grid, stream);
  }
  const auto launch =
      half ? launch_conv_bn_stats_window_float16 : launch_conv_bn_stats_window_bfloat16;
  return launch(made, index, grid, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(grid), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
