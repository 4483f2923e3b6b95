// What keeps a gradient of an input from TMA, how long it is predicted to take there, and its way
// from a problem to tensor maps and arguments. None of the rates has been measured by this project
// on a GPU; only their proportions matter.
#include "dgrad_tma.h"

#include <algorithm>

#include "conv_plan.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr double kWarpgroupUnit = 2048 * 0.85;  // products a cycle of a multiprocessor, by wgmma
constexpr double kResults = 36;                 // that the epilogue makes in a cycle
constexpr double kSharedLines = 128;            // bytes a cycle, for products, TMA and epilogue

// The same of y, which is read as dy is.
RfConvBnAct beside_of(const RfConvGradient& problem) {
  RfConvBnAct made = convolution_of(problem);
  made.x = problem.y;
  std::copy_n(problem.y_stride, 4, made.x_stride);
  return made;
}

}  // namespace

RfConvBnAct convolution_of(const RfConvGradient& problem) {
  const OutputSize size = output_size(problem);
  const int64_t (&filters)[4] = problem.weight_size;
  const int64_t sizes[2][4] = {
      {problem.x_size[0], filters[0], size.p, size.q},
      {problem.x_size[1], filters[0] / problem.groups, filters[2], filters[3]}};
  const int64_t strides[4] = {problem.weight_stride[1], problem.weight_stride[0],
                              problem.weight_stride[2], problem.weight_stride[3]};
  RfConvBnAct made{};
  made.x = problem.dy;
  made.weight = problem.weight;
  made.out = problem.x;
  made.scale = problem.scale;
  made.dtype = problem.dtype;
  made.groups = problem.groups;
  std::copy_n(sizes[0], 4, made.x_size);
  std::copy_n(sizes[1], 4, made.weight_size);
  std::copy_n(problem.dy_stride, 4, made.x_stride);
  std::copy_n(strides, 4, made.weight_stride);
  std::copy_n(problem.x_stride, 4, made.out_stride);
  for (int d = 0; d < 2; ++d) {
    made.stride[d] = 1;
    made.dilation[d] = problem.dilation[d];
    made.padding[d] = (filters[2 + d] - 1) * problem.dilation[d] - problem.padding[d];
  }
  return made;
}

std::string dgrad_tma_fault(const RfConvGradient& problem, const TmaTileFacts& tile,
                            const DgradNames& names, bool reads_y, int64_t images) {
  if (problem.stride[0] != 1 || problem.stride[1] != 1) {
    return "stride: " + std::to_string(problem.stride[0]) + " x " +
           std::to_string(problem.stride[1]) + "; 1 x 1 is accepted";
  }
  const RfConvBnAct made = convolution_of(problem);
  const TmaTypes types = tma_types(made);
  std::string found = tma_fault(made, types, tile, images, names.dy);
  if (!found.empty()) return found;
  // Per-channel values come two at a time.
  if (made.weight_size[1] % 2 != 0) return "weight: an odd number of filters";
  if (reinterpret_cast<uintptr_t>(problem.scale) % (2 * sizeof(float)) != 0) {
    return named(names.vectors, "its address is no multiple of 8");
  }
  if (!reads_y) return "";
  const RfConvBnAct beside = beside_of(problem);
  found = tma_pixels_fault(beside, types.operands, tile, images, "y");
  if (found.empty() && tma_is_dense(made) != tma_is_dense(beside)) {
    return "y: its pixels do not lie as " + std::string(names.dy) + "'s do";
  }
  return found;
}

double dgrad_tma_cost(const RfConvGradient& problem, const TmaTileFacts& tile,
                      const DgradWork& work, int64_t images, const RfGpu& gpu) {
  const RfConvBnAct made = convolution_of(problem);
  const int64_t pixels = images * problem.x_size[2] * problem.x_size[3];
  const int64_t blocks = tma_blocks(made, tile, pixels, gpu);
  const auto each = static_cast<double>(divide_up(tma_tiles(made, tile, pixels), blocks));
  const auto steps = static_cast<double>(divide_up(made.weight_size[1], kStepElements) *
                                         made.weight_size[2] * made.weight_size[3]);
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double left = (work.reads_y ? 2.0 : 1.0) * tile.pixels * kStepRowBytes;
  const double right = static_cast<double>(tile.channels) * kStepRowBytes;
  const double matrix = area * kStepElements / kWarpgroupUnit;
  // What has come is read once, but filters by each of the warpgroups.
  const double shared = (2 * left + (1 + kConsumers) * right) / kSharedLines;
  const double turning = tile.pixels * kStepElements / 2 * work.turning / kInstructions;
  const double multiply = steps * std::max({matrix, shared, turning});
  const double load = steps * (left + right) / kCacheBytes;
  const double results = area / kResults + area * work.finishing / kInstructions;
  const double ends = area * work.ends * kTmaElementBytes / kMemoryBytes;
  return each * std::max({multiply + results, load, ends}) + results + 2 * kLatency;
}

int64_t dgrad_tma_blocks(const RfConvGradient& problem, const TmaTileFacts& tile, int64_t images,
                         const RfGpu& gpu) {
  return tma_blocks(convolution_of(problem), tile, images * problem.x_size[2] * problem.x_size[3],
                    gpu);
}

int dgrad_tma_arguments(const RfConvGradient& problem, const TmaTileFacts& tile, bool reads_y,
                        int64_t first, int64_t images, ConvDgradTmaArguments* made) {
  const RfConvBnAct conv = convolution_of(problem);
  const TmaTypes types = tma_types(conv);
  made->masked = reads_y;
  const int error = tma_arguments(conv, types, tile, first, images, &made->conv);
  if (error != 0 || !reads_y) return error;
  return encode_tma_pixels(beside_of(problem), types.operands, tile, first, images, &made->y);
}

}  // namespace resnet_fused
