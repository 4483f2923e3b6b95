// conv_bn_stats for sm_90a: from a problem to its arguments, its prediction, and its launch. None
// of the rates has been measured by this project on a GPU; only their proportions matter.
#include "conv_bn_stats_tma.h"

#include <algorithm>
#include <cstddef>

#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "conv_strides.h"
#include "stats_parts.h"
#include "step_transform.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvStatsTmaArguments, conv) == 0);
static_assert(offsetof(ConvStatsTmaArguments, norm) == 768);
static_assert(offsetof(ConvStatsTmaArguments, arrivals) == 824);
static_assert(offsetof(ConvStatsTmaArguments, stats) == 848);

namespace {

int64_t all_pixels(const RfConvBnAct& conv) {
  const OutputSize size = output_size(conv);
  return conv.x_size[0] * size.p * size.q;
}
int64_t group_channels(const RfConvBnAct& conv) { return conv.weight_size[0] / conv.groups; }

// Tiles of channels as wide as a cluster's, of all groups.
int64_t columns_of(const RfConvBnAct& conv, const TmaTileFacts& tile) {
  return divide_up(group_channels(conv), int64_t{tile.channels} * tile.pixel_sharing) * conv.groups;
}

// The GPU as the plan of a convolution is told it: no more multiprocessors than a launch has
// blocks.
RfGpu with_blocks(const RfConvBnAct& conv, const TmaTileFacts& tile, const RfGpu& gpu) {
  const int64_t columns = columns_of(conv, tile);
  const int64_t clusters = std::max(1, gpu.multiprocessors / tile.sharing);
  RfGpu made = gpu;
  made.multiprocessors =
      narrowed(columns * std::max<int64_t>(1, clusters / columns) * tile.sharing);
  return made;
}

// Of a launch by so many blocks.
WalkedParts walked_by(const RfConvBnAct& conv, const TmaTileFacts& tile, int64_t blocks) {
  const int64_t pixels = all_pixels(conv);
  const int64_t walks = tile.together ? 1 : kConsumers;  // of a block
  return {pixels, narrowed(divide_up(pixels, tile.pixels)), tile.pixels,
          narrowed(blocks / (columns_of(conv, tile) * tile.pixel_sharing) * walks)};
}
StatsParts parts_of(const RfConvBnAct& conv, const WalkedParts& walked) {
  return stats_parts(walked.count(), conv.weight_size[0], conv.groups);
}

}  // namespace

TmaTileFacts stats_tma_tile(int index) {
  return StatsTmaTiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string stats_tma_fault(const RfConvBnStats& problem, const TmaTileFacts& tile) {
  const RfConvBnAct& conv = problem.conv;
  if (problem.normed != 0) {
    if (tile.sharing > 1) return "norm: not read through by blocks that share filters or pixels";
    const std::string found = norm_fault(conv.weight_size[1], problem.norm);
    if (!found.empty()) return found;
  }
  if (all_pixels(conv) > kMost - tile.pixels) {
    return "batch: more pixels than a launch counts, and statistics meet in one";
  }
  return tma_fault(conv, tma_types(conv), tile, conv.x_size[0]);
}

int64_t stats_tma_blocks(const RfConvBnStats& problem, const TmaTileFacts& tile, const RfGpu& gpu) {
  const RfConvBnAct& conv = problem.conv;
  return tma_blocks(conv, tile, all_pixels(conv), with_blocks(conv, tile, gpu));
}

// A convolution's, of which a tile's results are measured, too: beside other tiles' products, or
// between them. Then parts are stored, merged in chunks, and chunks are.
double stats_tma_cost(const RfConvBnStats& problem, const TmaTileFacts& tile, const RfGpu& gpu) {
  const RfConvBnAct& conv = problem.conv;
  const RfGpu limited = with_blocks(conv, tile, gpu);
  const int64_t pixels = all_pixels(conv);
  const int64_t clusters = tma_blocks(conv, tile, pixels, limited) / tile.sharing;
  const auto each = static_cast<double>(divide_up(tma_tiles(conv, tile, pixels), clusters));
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double measuring = area * kMeasureInstructions / kInstructions;
  StepTransform transform{};
  if (problem.normed != 0) {
    transform = step_transform(1, tile.pixels);
  }
  const double chunk = kChunkTiles * kWarpgroupRows * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting + tma_cost(conv, tma_types(conv), tile, pixels, limited, transform) +
         (tile.together ? each : 1) * measuring + chunk + 4 * kLatency;
}

int64_t stats_tma_bytes(const RfConvBnStats& problem, const TmaTileFacts& tile, int64_t blocks) {
  return parts_of(problem.conv, walked_by(problem.conv, tile, blocks)).bytes;
}

int stats_tma_arguments(const RfConvBnStats& problem, const RfConvPlan& plan,
                        const TmaTileFacts& tile, void* workspace, ConvStatsTmaArguments* made) {
  const RfConvBnAct& conv = problem.conv;
  const int error = tma_arguments(conv, tma_types(conv), tile, 0, conv.x_size[0], &made->conv);
  if (error != 0) return error;
  if (problem.normed != 0) {
    const auto* scale = static_cast<const float*>(problem.norm);
    made->norm = {scale, scale + conv.x_size[1], narrowed(conv.x_size[2]),
                  narrowed(conv.x_size[3])};
  }
  made->measured = walked_by(conv, tile, plan.blocks);
  made->groups = conv.groups;
  made->columns = narrowed(divide_up(group_channels(conv), kWarpgroupRows));
  place_parts(parts_of(conv, made->measured), problem, workspace, made);
  return 0;
}

int run_conv_bn_stats_tma(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                          void* stream) {
  const int index = plan.configuration - kFirstStatsTma;
  ConvStatsTmaArguments made{};
  const int error = stats_tma_arguments(problem, plan, stats_tma_tile(index), workspace, &made);
  if (error != 0) return error;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.conv.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_stats_tma_float16 : launch_conv_bn_stats_tma_bfloat16;
  return launch(made, index, narrowed(plan.blocks), stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
