// The table of conv_dgrad's configurations for sm_90a, what they do not take, how long they are
// predicted to take, and the way from a problem to a launch. None of the rates has been measured by
// this project on a GPU; only their proportions matter.
#include "conv_dgrad_tma.h"

#include <algorithm>
#include <vector>

#include "conv_dgrad_tma_tiles.h"
#include "conv_plan.h"
#include "tma_request.h"

namespace resnet_fused {

namespace {

constexpr double kWarpgroupUnit = 2048 * 0.85;  // products a cycle of a multiprocessor, by wgmma
constexpr double kResults = 36;                 // that the epilogue makes in a cycle
constexpr double kSharedLines = 128;            // bytes a cycle, for products, TMA and epilogue
// Instructions that two elements of dy take until they are an operand: to be loaded with y's,
// widened, scaled, compared and packed.
constexpr double kTurnInstructions = 14;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

TmaTileFacts tile_at(int index) {
  return DgradTmaTiles::with(index, []<class Shape>() {
    TmaTileFacts tile = facts_of<Shape>();
    tile.across = true;
    return tile;
  });
}

const std::vector<Entry>& table() {
  static const std::vector<Entry> made = [] {
    std::vector<Entry> entries;
    for (int i = 0; i < DgradTmaTiles::kSize; ++i) {
      entries.push_back({tma_name(tile_at(i)), tma_configuration(tile_at(i))});
    }
    return entries;
  }();
  return made;
}

// The convolution of dy that a gradient by a stride of 1 is. Weight keeps its memory: channels have
// changed sides in sizes and strides, and taps are walked backwards.
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

// The same of y: what says where the gradient passes is read as dy is.
RfConvBnAct mask_of(const RfConvGradient& problem) {
  RfConvBnAct made = convolution_of(problem);
  made.x = problem.y;
  std::copy_n(problem.y_stride, 4, made.x_stride);
  return made;
}

}  // namespace

int32_t dgrad_tma_configurations() { return DgradTmaTiles::kSize; }
const RfConvConfiguration* dgrad_tma_configuration(int32_t index) {
  return configuration_at<table>(index);
}

std::string dgrad_tma_fault(const RfConvGradient& problem, int index, int64_t images) {
  if (problem.stride[0] != 1 || problem.stride[1] != 1) {
    return "stride: " + std::to_string(problem.stride[0]) + " x " +
           std::to_string(problem.stride[1]) + "; 1 x 1 is accepted";
  }
  const RfConvBnAct made = convolution_of(problem);
  const TmaTypes types = tma_types(made);
  const TmaTileFacts tile = tile_at(index);
  std::string found = tma_fault(made, types, tile, images, "dy");
  if (!found.empty()) return found;
  // Scales come two at a time.
  if (made.weight_size[1] % 2 != 0) return "weight: an odd number of filters";
  if (reinterpret_cast<uintptr_t>(problem.scale) % (2 * sizeof(float)) != 0) {
    return "scale: its address is no multiple of 8";
  }
  if (problem.y == nullptr) return "";
  const RfConvBnAct mask = mask_of(problem);
  found = tma_pixels_fault(mask, types.operands, tile, images, "y");
  if (found.empty() && tma_is_dense(made) != tma_is_dense(mask)) {
    return "y: its pixels do not lie as dy's do";
  }
  return found;
}

double dgrad_tma_cost(const RfConvGradient& problem, int index, int64_t images, const RfGpu& gpu) {
  const RfConvBnAct made = convolution_of(problem);
  const TmaTileFacts tile = tile_at(index);
  const int64_t pixels = images * problem.x_size[2] * problem.x_size[3];
  const int64_t blocks = tma_blocks(made, tile, pixels, gpu);
  const auto each = static_cast<double>(divide_up(tma_tiles(made, tile, pixels), blocks));
  const auto steps = static_cast<double>(divide_up(made.weight_size[1], kStepElements) *
                                         made.weight_size[2] * made.weight_size[3]);
  const double operands = problem.y != nullptr ? 2 : 1;
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double left = operands * tile.pixels * kStepRowBytes;
  const double right = static_cast<double>(tile.channels) * kStepRowBytes;
  const double matrix = area * kStepElements / kWarpgroupUnit;
  // What has come is read once, but filters by each of the warpgroups.
  const double shared = (2 * left + (1 + kConsumers) * right) / kSharedLines;
  const double turning = tile.pixels * kStepElements / 2 * kTurnInstructions / kInstructions;
  const double multiply = steps * std::max({matrix, shared, turning});
  const double load = steps * (left + right) / kCacheBytes;
  const double results = area / kResults;
  const double ends = area * kTmaElementBytes / kMemoryBytes;
  return each * std::max({multiply + results, load, ends}) + results + 2 * kLatency;
}

int64_t dgrad_tma_blocks(const RfConvGradient& problem, int index, int64_t images,
                         const RfGpu& gpu) {
  return tma_blocks(convolution_of(problem), tile_at(index),
                    images * problem.x_size[2] * problem.x_size[3], gpu);
}

int run_conv_dgrad_tma(const RfConvGradient& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream) {
  const int index = plan.configuration - kFirstDgradTma;
  const RfConvBnAct made = convolution_of(problem);
  const TmaTypes types = tma_types(made);
  const TmaTileFacts tile = tile_at(index);
  ConvDgradTmaArguments arguments{};
  int error = tma_arguments(made, types, tile, first, images, &arguments.conv);
  arguments.masked = problem.y != nullptr;
  if (error == 0 && arguments.masked) {
    error = encode_tma_pixels(mask_of(problem), types.operands, tile, first, images, &arguments.y);
  }
  if (error != 0) return error;
  const int32_t blocks = tma_blocks(arguments.conv, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_dgrad_tma_float16 : launch_conv_dgrad_tma_bfloat16;
  return launch(arguments, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
