// conv_bn_stats for sm_90a: from a problem to its arguments, its prediction, and its launch. None
// of the rates has been measured by this project on a GPU; only their proportions matter.
#include "conv_bn_stats_tma.h"

#include <algorithm>
#include <cstddef>

#include "conv_plan.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvStatsTmaArguments, conv) == 0);
static_assert(offsetof(ConvStatsTmaArguments, norm) == 768);
static_assert(offsetof(ConvStatsTmaArguments, arrivals) == 824);
static_assert(offsetof(ConvStatsTmaArguments, stats) == 848);

namespace {

// Instructions to round, add, subtract and square an element of the result.
constexpr double kMeasureInstructions = 8;
// Likewise to load, widen, multiply, add, round, compare and store one that is transformed; and
// those of single threads that three warps issue in a cycle, at two thirds of one a warp.
constexpr double kTransformInstructions = 4.5;
constexpr double kTransformInstructionsACycle = 64;
constexpr int64_t kNormedChannels = 8;  // that a thread transforms at a time

int64_t all_pixels(const RfConvBnAct& conv) {
  const OutputSize size = output_size(conv);
  return conv.x_size[0] * size.p * size.q;
}
int64_t group_channels(const RfConvBnAct& conv) { return conv.weight_size[0] / conv.groups; }

// Tiles of channels, of all groups.
int64_t columns_of(const RfConvBnAct& conv, const TmaTileFacts& tile) {
  return divide_up(group_channels(conv), tile.channels) * conv.groups;
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

// Where in the workspace what lies, in bytes.
struct TmaStatsLayout {
  WalkedParts measured;
  int64_t moments;  // behind the counters
  int64_t merged;
  int64_t bytes;
};

TmaStatsLayout layout_of(const RfConvBnAct& conv, const TmaTileFacts& tile, int64_t blocks) {
  const int64_t pixels = all_pixels(conv);
  const int64_t walks = tile.together ? 1 : kConsumers;  // of a block
  TmaStatsLayout layout{};
  layout.measured = {pixels, narrowed(divide_up(pixels, tile.pixels)), tile.pixels,
                     narrowed(blocks / columns_of(conv, tile) * walks)};
  const int64_t parts = layout.measured.count();
  const int64_t chunks = TileChunks{layout.measured.count()}.count();
  const int64_t filters = conv.weight_size[0];
  const int64_t columns = divide_up(group_channels(conv), kWarpgroupRows) * conv.groups;
  const auto aligned = [](int64_t bytes) {
    return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
  };
  layout.moments = arrival_bytes(columns * (chunks + 1));
  layout.merged = layout.moments + aligned(parts * filters * int64_t{sizeof(Moments)});
  layout.bytes = layout.merged + (chunks > 1 ? chunks * filters * int64_t{sizeof(WideMoments)} : 0);
  return layout;
}

}  // namespace

TmaTileFacts stats_tma_tile(int index) {
  return StatsTmaTiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string stats_tma_fault(const RfConvBnStats& problem, const TmaTileFacts& tile) {
  const RfConvBnAct& conv = problem.conv;
  if (problem.normed != 0) {
    if (conv.x_size[1] % kNormedChannels != 0) {
      return "norm: " + std::to_string(conv.x_size[1]) + " channels; a multiple of " +
             std::to_string(kNormedChannels) + " is accepted";
    }
    if (tile.sharing > 1) return "norm: not read through by blocks that share filters";
    if (!is_aligned(problem.norm)) return "norm: address is not a multiple of 16";
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
    const double elements = static_cast<double>(tile.pixels) * kStepElements;
    transform = {2 * elements * kTmaElementBytes,
                 elements * kTransformInstructions / kTransformInstructionsACycle};
  }
  const double chunk = kChunkTiles * kWarpgroupRows * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting + tma_cost(conv, tma_types(conv), tile, pixels, limited, transform) +
         (tile.together ? each : 1) * measuring + chunk + 4 * kLatency;
}

int64_t stats_tma_bytes(const RfConvBnStats& problem, const TmaTileFacts& tile, int64_t blocks) {
  return layout_of(problem.conv, tile, blocks).bytes;
}

int run_conv_bn_stats_tma(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                          void* stream) {
  const RfConvBnAct& conv = problem.conv;
  const int index = plan.configuration - kFirstStatsTma;
  const TmaTileFacts tile = stats_tma_tile(index);
  ConvStatsTmaArguments made{};
  const int error = tma_arguments(conv, tma_types(conv), tile, 0, conv.x_size[0], &made.conv);
  if (error != 0) return error;
  const TmaStatsLayout layout = layout_of(conv, tile, plan.blocks);
  if (problem.normed != 0) {
    const auto* scale = static_cast<const float*>(problem.norm);
    made.norm = {scale, scale + conv.x_size[1], narrowed(conv.x_size[2]), narrowed(conv.x_size[3])};
  }
  made.measured = layout.measured;
  made.groups = conv.groups;
  made.columns = narrowed(divide_up(group_channels(conv), kWarpgroupRows));
  made.arrivals = static_cast<uint32_t*>(workspace);
  made.moments = static_cast<Moments*>(moved(workspace, layout.moments));
  made.merged = static_cast<WideMoments*>(moved(workspace, layout.merged));
  made.stats = static_cast<float*>(problem.stats);
  made.cleared_bytes = layout.moments;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_stats_tma_float16 : launch_conv_bn_stats_tma_bfloat16;
  return launch(made, index, narrowed(plan.blocks), stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
