// conv_bn_act for sm_90a by clusters that share a reduction: from a problem to its arguments, its
// prediction, and its launch. None of the rates has been measured by this project on a GPU; only
// their proportions matter.
#include "conv_bn_act_cluster.h"

#include <algorithm>
#include <cstddef>

#include "conv_plan.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ConvClusterArguments, conv) == 0);
static_assert(offsetof(ConvClusterArguments, residual) == 768);
static_assert(offsetof(ConvClusterArguments, out) == 776);

namespace {

int64_t cluster_steps(const RfConvBnAct& problem) {
  const int64_t (&size)[4] = problem.weight_size;
  return divide_up(size[1], kStepElements) * size[2] * size[3];
}

}  // namespace

TmaTileFacts cluster_tile(int index) {
  return ConvClusterTiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string cluster_name(const TmaTileFacts& tile) {
  return "tma_cluster" + std::to_string(tile.pixels) + "x" + std::to_string(tile.channels) + "_" +
         std::to_string(tile.stages) + "s";
}

std::string cluster_fault(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images) {
  std::string found = tma_fault(problem, tma_types(problem), tile, images);
  const int64_t channels = problem.weight_size[0] / problem.groups;
  if (found.empty() && channels % kQuad != 0) {
    return "channels: " + std::to_string(channels) + " of the output; a multiple of " +
           std::to_string(kQuad) + " is accepted";
  }
  return found;
}

std::string cluster_blocks_fault(const RfConvBnAct& problem, int64_t blocks) {
  if (!is_cluster(blocks)) return "splits: 2, 4 or 8 are served by clusters";
  const int64_t steps = cluster_steps(problem);
  if (steps >= blocks) return "";
  return "splits: " + std::to_string(blocks) + " of a reduction of " + std::to_string(steps) +
         " steps";
}

// The busiest multiprocessor's blocks, one after the other: loads, beside which products run, then
// the sums of all to all. A block reads as many sums as it has put down, but for its own part.
double cluster_cost(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                    int64_t blocks, const RfGpu& gpu) {
  const int64_t channels = problem.weight_size[0] / problem.groups;
  const int64_t tiles =
      divide_up(pixels, tile.pixels) * divide_up(channels, tile.channels) * problem.groups;
  const auto busy =
      static_cast<double>(divide_up(tiles * blocks, cluster_multiprocessors(blocks, gpu)));
  const auto steps = static_cast<double>(divide_up(cluster_steps(problem), blocks));
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double written = (static_cast<double>(tile.pixels) + tile.channels) * kStepRowBytes;
  const double matrix = area * kStepElements / kWarpgroupUnit;
  // Products read what loads have written.
  const double load = steps * std::max({written / kCacheBytes, 2 * written / kSharedBytes, matrix});
  const double sums = area * static_cast<double>(sizeof(float));
  const auto others = static_cast<double>(blocks - 1) / static_cast<double>(blocks);
  const double exchange = sums / kSharedBytes + others * sums / kClusterBytes;
  return busy * (load + exchange) + 2 * kClusterMeeting + 2 * kLatency;
}

int run_conv_bn_act_cluster(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                            int64_t images, void* stream) {
  const int index = plan.configuration - kFirstCluster;
  const TmaTypes types = tma_types(problem);
  ConvClusterArguments made{};
  const int error = tma_arguments(problem, types, cluster_tile(index), first, images, &made.conv);
  if (error != 0) return error;
  const OutputSize size = output_size(problem);
  const int64_t shape[4] = {problem.x_size[0], problem.weight_size[0], size.p, size.q};
  // The first image's address onwards; a stride of one image alone is not used.
  const auto from = [&](int64_t stride) {
    return shape[0] > 1 ? first * stride * kTmaElementBytes : 0;
  };
  made.out = moved(problem.out, from(problem.out_stride[0]));
  made.residual = moved(problem.residual, from(problem.residual_stride[0]));
  made.out_pixel = *pixel_step(shape, problem.out_stride);
  if (made.residual != nullptr) made.residual_pixel = *pixel_step(shape, problem.residual_stride);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_conv_bn_act_cluster_float16 : launch_conv_bn_act_cluster_bfloat16;
  return launch(made, index, plan.splits, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
