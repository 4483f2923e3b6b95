// bn_add_act_conv_stats for sm_90a: from a problem to its prediction and its launch. None of the
// rates has been measured by this project on a GPU; only their proportions matter.
#include "bn_add_act_conv_stats_tma.h"

#include <algorithm>
#include <cstddef>

#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "step_transform.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(BlockEndTmaArguments, stats) == 0);
static_assert(offsetof(BlockEndTmaArguments, shortcut) == 1024);
static_assert(offsetof(BlockEndTmaArguments, made) == 1152);
static_assert(offsetof(BlockEndTmaArguments, shortcut_scale) == 1280);

namespace {

int64_t pixels_of(const RfConvBnAct& conv) {
  return conv.x_size[0] * conv.x_size[2] * conv.x_size[3];
}

// A tensor of the block's size, as a matrix of pixels.
TensorMapRequest pixels_request(const RfConvBnAct& conv, const TmaTileFacts& tile, const void* at,
                                const int64_t (&stride)[4]) {
  return rows_request(element_of(conv.dtype), at, conv.x_size[1], pixels_of(conv),
                      *pixel_step(conv.x_size, stride), tile.pixels);
}

// Instructions beside those of an element that is read through a BatchNorm: the shortcut's is
// loaded, widened and added, or multiplied and added twice.
constexpr double kShortcutInstructions = 1.5;
constexpr double kProjectedInstructions = 1;

// The busiest block's tiles. Steps come, are made, and are stored beside the products of others;
// the two warpgroups multiply together, and store and measure then, while the ring fills. Of all
// columns' reading memory sees one: what the others read, L2 has.
double cost(const RfBnAddActConvStats& problem, const TmaTileFacts& tile, int64_t blocks) {
  const RfConvBnAct& conv = problem.stats.conv;
  const auto columns = static_cast<double>(divide_up(conv.weight_size[0], tile.channels));
  const auto steps = static_cast<double>(divide_up(conv.x_size[1], kStepElements));
  const auto each = static_cast<double>(divide_up(tma_tiles(conv, tile, pixels_of(conv)), blocks));
  const double halves = static_cast<double>(tile.channels) / (kConsumers * kWarpgroupRows);
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double pixels = static_cast<double>(tile.pixels) * kStepRowBytes;
  const double filters = static_cast<double>(tile.channels) * kStepRowBytes;
  StepTransform made = step_transform(1, tile.pixels);
  const double more = kShortcutInstructions + (problem.projected != 0 ? kProjectedInstructions : 0);
  made.cycles +=
      static_cast<double>(tile.pixels) * kStepElements * more / kTransformInstructionsACycle;
  // Read and written by those who make it, the shortcut too; by two warpgroups' products, a half of
  // the channels at a time; by TMA on both ways.
  const double lines =
      (made.bytes + pixels + filters + 2 * halves * pixels + filters + (2 + 1 / columns) * pixels) /
      kSharedBytes;
  const double matrix = area * kStepElements / kWarpgroupUnit;
  const double load = (2 * pixels + filters) / kCacheBytes;
  const double memory = 3 * pixels / columns / kMemoryBytes;
  const double multiply = std::max(matrix, lines);
  // A stage's way: to come, to be made, to be multiplied, and to be let go behind the next step's
  // beginning.
  const double way = (kLatency + made.cycles + 2 * multiply) / tile.stages;
  const double step = std::max({multiply, load, memory, made.cycles, way});
  const double results = area / kResults + area * kMeasureInstructions / kInstructions;
  const double ends = area * kTmaElementBytes / kMemoryBytes;
  // What is under way while the results go out is a ring of steps.
  const double ring = std::min(steps, static_cast<double>(tile.stages)) * step;
  const double of_tile = steps * step + std::max({0.0, ends, results - ring});
  const double chunk = kChunkTiles * kWarpgroupRows * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting + each * of_tile + results + 2 * kLatency + halves * (chunk + 4 * kLatency);
}

}  // namespace

TmaTileFacts block_end_tma_tile(int index) {
  return BlockEndTmaTiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string block_end_tma_fault(const RfBnAddActConvStats& problem, const TmaTileFacts& tile) {
  const RfConvBnAct& conv = problem.stats.conv;
  const TensorElement element = element_of(conv.dtype);
  const int64_t images = conv.x_size[0];
  std::string found = tma_shape_fault(conv, tma_types(conv));
  if (!found.empty()) return found;
  found = norm_fault(conv.x_size[1], problem.stats.norm);
  if (!found.empty()) return found;
  if (pixels_of(conv) > kMost - tile.pixels) {
    return "batch: more pixels than a launch counts, and statistics meet in one";
  }
  if (problem.projected != 0 && !is_aligned(problem.residual_norm)) {
    return "residual_norm: address is not a multiple of 16";
  }
  found = tma_pixels_fault(conv, element, tile, images, "y");
  if (!found.empty()) return found;
  found = tma_weight_fault(conv, element, tile);
  if (!found.empty()) return found;
  found = named("residual", tensor_map_fault(pixels_request(conv, tile, problem.residual,
                                                            problem.residual_stride)));
  if (!found.empty()) return found;
  found =
      named("out", tensor_map_fault(pixels_request(conv, tile, problem.out, problem.out_stride)));
  if (!found.empty()) return found;
  return tma_output_fault("z", conv, element, tile, conv.out, conv.out_stride, images);
}

RfConvPlan block_end_tma_plan(const RfBnAddActConvStats& problem, const TmaTileFacts& tile,
                              const RfGpu& gpu) {
  RfConvPlan plan{};
  plan.splits = 1;
  plan.launches = 1;
  plan.images_a_launch = problem.stats.conv.x_size[0];
  plan.blocks = stats_tma_blocks(problem.stats, tile, gpu);
  plan.workspace_bytes = stats_tma_bytes(problem.stats, tile, plan.blocks);
  plan.cycles = cost(problem, tile, plan.blocks);
  return plan;
}

int run_bn_add_act_conv_stats_tma(const RfBnAddActConvStats& problem, const RfConvPlan& plan,
                                  void* workspace, void* stream) {
  const int index = plan.configuration - kFirstBlockEndTma;
  const RfConvBnAct& conv = problem.stats.conv;
  const TmaTileFacts tile = block_end_tma_tile(index);
  BlockEndTmaArguments made{};
  int error = stats_tma_arguments(problem.stats, plan, tile, workspace, &made.stats);
  if (error == 0) {
    error = encode_tensor_map(pixels_request(conv, tile, problem.residual, problem.residual_stride),
                              &made.shortcut);
  }
  if (error == 0) {
    error =
        encode_tensor_map(pixels_request(conv, tile, problem.out, problem.out_stride), &made.made);
  }
  if (error != 0) return error;
  if (problem.projected != 0) {
    made.shortcut_scale = static_cast<const float*>(problem.residual_norm);
    made.shortcut_shift = made.shortcut_scale + conv.x_size[1];
  }
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_bn_add_act_conv_stats_tma_float16 : launch_bn_add_act_conv_stats_tma_bfloat16;
  return launch(made, index, narrowed(plan.blocks), stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
