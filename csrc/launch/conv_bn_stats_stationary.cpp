// conv_bn_stats for sm_90a with filters that stay: from a problem to its prediction and its launch.
// None of the rates has been measured by this project on a GPU; only their proportions matter.
#include "conv_bn_stats_stationary.h"

#include <algorithm>

#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "step_transform.h"

namespace resnet_fused {
namespace {

int64_t steps_of(const RfConvBnAct& conv) {
  return divide_up(conv.weight_size[1], kStepElements) * conv.weight_size[2] * conv.weight_size[3];
}

// The filters come once. Loads and those who transform never stop; a warpgroup stores and measures
// a tile while the other one multiplies, so that two tiles take what one warpgroup takes for one,
// at least. Two columns of parts are merged one after the other.
double cost(const RfConvBnStats& problem, const StationaryTileFacts& tile, int64_t blocks) {
  const RfConvBnAct& conv = problem.conv;
  const OutputSize size = output_size(conv);
  const int64_t tiles = tma_tiles(conv, tile, conv.x_size[0] * size.p * size.q);
  const auto steps = static_cast<double>(steps_of(conv));
  const auto each = static_cast<double>(divide_up(tiles, blocks));
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double pixel_bytes = static_cast<double>(tile.pixels) * kStepRowBytes;
  const double filter_bytes = static_cast<double>(tile.channels) * kStepRowBytes;
  const double halves = static_cast<double>(tile.channels) / kWarpgroupRows;
  StepTransform transform{};
  if (problem.normed != 0) transform = step_transform(1, tile.pixels);
  const double matrix = area * kStepElements / kWarpgroupUnit;
  const double lines =
      (filter_bytes + halves * pixel_bytes + pixel_bytes + transform.bytes) / kSharedBytes;
  const double load = pixel_bytes / kCacheBytes;
  const double multiply = std::max(matrix, lines);
  const double step = std::max({multiply, load, transform.cycles});
  // A stage's way, to come, to be transformed, to be multiplied, and to be let go behind the next
  // step's beginning, goes on in all of them at one time.
  const double way = (kLatency + transform.cycles + 2 * multiply) / tile.stages;
  const double results = area / kResults + area * kMeasureInstructions / kInstructions;
  const double ends = area * kTmaElementBytes / kMemoryBytes;
  const double of_tile =
      std::max({steps * std::max(step, way), (steps * multiply + results) / kConsumers, ends});
  const double chunk = kChunkTiles * kWarpgroupRows * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting + steps * filter_bytes / kCacheBytes + each * of_tile + results + 2 * kLatency +
         halves * (chunk + 4 * kLatency);
}

}  // namespace

StationaryTileFacts stats_stationary_tile(int index) {
  return StatsStationaryTiles::with(
      index, []<class Shape>() { return StationaryTileFacts{facts_of<Shape>(), Shape::kSteps}; });
}

std::string stats_stationary_name(const StationaryTileFacts& tile) {
  return "tma_stay" + std::to_string(tile.pixels) + "x" + std::to_string(tile.channels) + "_" +
         std::to_string(tile.stages) + "s";
}

std::string stats_stationary_fault(const RfConvBnStats& problem, const StationaryTileFacts& tile) {
  std::string found = stats_tma_fault(problem, tile);
  if (!found.empty()) return found;
  const int64_t steps = steps_of(problem.conv);
  if (steps <= tile.steps) return "";
  return "weight: " + std::to_string(steps) + " steps of 64 channels of a tap; the filters of " +
         std::to_string(tile.steps) + " stay";
}

RfConvPlan stats_stationary_plan(const RfConvBnStats& problem, const StationaryTileFacts& tile,
                                 const RfGpu& gpu) {
  RfConvPlan plan{};
  plan.splits = 1;
  plan.launches = 1;
  plan.images_a_launch = problem.conv.x_size[0];
  plan.blocks = stats_tma_blocks(problem, tile, gpu);
  plan.workspace_bytes = stats_tma_bytes(problem, tile, plan.blocks);
  plan.cycles = cost(problem, tile, plan.blocks);
  return plan;
}

int run_conv_bn_stats_stationary(const RfConvBnStats& problem, const RfConvPlan& plan,
                                 void* workspace, void* stream) {
  const int index = plan.configuration - kFirstStatsStationary;
  ConvStatsTmaArguments made{};
  const int error =
      stats_tma_arguments(problem, plan, stats_stationary_tile(index), workspace, &made);
  if (error != 0) return error;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.conv.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_conv_bn_stats_stationary_float16 : launch_conv_bn_stats_stationary_bfloat16;
  return launch(made, index, narrowed(plan.blocks), stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
