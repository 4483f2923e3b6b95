// conv_bn_stats of a stem for sm_90a: from a problem to its arguments, its prediction, and its
// launch. None of the rates has been measured by this project on a GPU; only their proportions
// matter.
#include "conv_bn_stats_stem.h"

#include <algorithm>

#include "conv_image.h"
#include "conv_plan.h"
#include "conv_stats_rates.h"
#include "conv_strides.h"
#include "stats_parts.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr int64_t kFar = int64_t{1} << 29;  // twice a position stays in 32 bits
// Cycles until the filters lie in shared memory, and until a strip's first rows do.
constexpr double kFilters = 4000;
constexpr double kStrip = 3 * kLatency;
constexpr int kRowProducts = 2 * kStemTaps;  // instructions of a row of the convolution
constexpr int kProductDepth = 16;

struct Facts {
  int32_t columns;  // of a tile
  int32_t pair_bytes;
  int32_t stages;
  int32_t row_bytes;
  int32_t shared_bytes;
};
Facts facts_at(int index) {
  return StatsStemTiles::with(index, []<class Shape>() {
    return Facts{Shape::kColumns, Shape::kPairBytes, Shape::kPairs, Shape::kRowBytes,
                 Shape::kSharedBytes};
  });
}

TensorMapRequest y_request(const RfConvBnAct& conv, const Facts& tile) {
  const OutputSize made = output_size(conv);
  const int64_t size[4] = {conv.x_size[0], conv.weight_size[0], made.p, made.q};
  const TensorElement element = element_of(conv.dtype);
  TensorMapRequest request = images_request(element, conv.out, size, conv.out_stride);
  request.box = {request.box[0], tile.columns, 1, 1};
  return request;
}

int64_t columns_of(const RfConvBnAct& conv) { return divide_up(conv.weight_size[0], kStemFilters); }
int64_t tiles_of(const RfConvBnAct& conv, const Facts& tile) {
  return divide_up(output_size(conv).q, tile.columns);
}
int64_t rows_of(const RfConvBnAct& conv, const Facts& tile) {
  return conv.x_size[0] * tiles_of(conv, tile) * output_size(conv).p;
}

// blocks: of all columns.
StemRuns runs_of(const RfConvBnAct& conv, const Facts& tile, int64_t blocks) {
  const OutputSize size = output_size(conv);
  return {narrowed(rows_of(conv, tile)),
          narrowed(size.p),
          narrowed(size.q),
          narrowed(tiles_of(conv, tile)),
          tile.columns,
          narrowed(kConsumers * (blocks / columns_of(conv)))};
}

StatsParts parts_of(const RfConvBnAct& conv, const StemRuns& runs) {
  return stats_parts(runs.count(), conv.weight_size[0], conv.groups);
}

// The busiest multiprocessor's rows, two at a time: a row of each worker shares the tensor cores,
// shared memory and memory with the other one's. Rows are measured beside the next ones' products.
double cost(const RfConvBnAct& conv, const Facts& tile, int64_t blocks, const RfGpu& gpu) {
  const StemRuns runs = runs_of(conv, tile, blocks);
  const int64_t turns = divide_up(blocks, gpu.multiprocessors);
  const int64_t each = divide_up(runs.rows, runs.runs);
  const int64_t strips = divide_up(each, runs.height) + 1;
  const double results = static_cast<double>(tile.columns) * kStemFilters;
  const double matrix = results * kRowProducts * kProductDepth / kWarpgroupUnit;
  const double read = kRowProducts * 2.0 * kProductDepth * (kStemFilters + tile.columns);
  const double stored = results * kTmaElementBytes;
  const double shared = (read + tile.pair_bytes + 2 * stored) / kSharedBytes;
  const double measuring = results * kMeasureInstructions / kInstructions;
  // What a worker brings of the image, two new rows, as elements.
  const double image = 4.0 * tile.columns * static_cast<double>(conv.x_size[1]) * kTmaElementBytes;
  const double memory = (stored + image) / kMemoryBytes;
  const double row = std::max({kConsumers * std::max({matrix, shared, measuring, memory}),
                               results / kResults + measuring, kLatency});
  const double chunk = kChunkTiles * kStemFilters * double{sizeof(Moments)} / kCacheBytes;
  return kMeeting + chunk + 4 * kLatency +
         static_cast<double>(turns) *
             (kFilters + static_cast<double>(strips) * kStrip + static_cast<double>(each) * row);
}

}  // namespace

std::string stats_stem_name(int index) {
  const Facts tile = facts_at(index);
  return "tma_image" + std::to_string(tile.columns) + "x" + std::to_string(kStemFilters) + "_" +
         std::to_string(tile.stages) + "s";
}

RfConvConfiguration stats_stem_configuration(int index) {
  const Facts tile = facts_at(index);
  // Two warpgroups multiply.
  RfConvConfiguration made{nullptr,     1, tile.columns,   kStemFilters,      1, 8,
                           tile.stages, 1, tile.row_bytes, tile.shared_bytes, 0, 1};
  made.image = 1;
  return made;
}

std::string stats_stem_fault(const RfConvBnStats& problem, int index) {
  const RfConvBnAct& conv = problem.conv;
  if (const char* fault = image_fault(conv, problem.normed != 0)) return fault;
  if (conv.weight_size[2] != kStemTaps || conv.weight_size[3] != kStemTaps ||
      conv.stride[0] != kStemStride || conv.dilation[0] != 1) {
    return "wgmma reads an image by filters of 7 x 7 with a stride of 2 and a dilation of 1";
  }
  const Facts tile = facts_at(index);
  const auto far = [](int64_t value) { return value >= kFar; };
  if (std::any_of(conv.x_size, conv.x_size + 4, far) || far(conv.padding[0]) ||
      far(conv.padding[1]) || far(conv.weight_size[0]) || rows_of(conv, tile) > kMost) {
    return "batch: more rows than a launch counts, and statistics meet in one";
  }
  if (conv.out_stride[1] != 1) return "out: its channels are not adjacent";
  return named("out", tensor_map_fault(y_request(conv, tile)));
}

RfConvPlan stats_stem_plan(const RfConvBnStats& problem, int index, const RfGpu& gpu) {
  const RfConvBnAct& conv = problem.conv;
  const Facts tile = facts_at(index);
  const int64_t columns = columns_of(conv);
  const int64_t of_column = std::max<int64_t>(1, gpu.multiprocessors / columns);
  RfConvPlan plan{};
  plan.splits = 1;
  plan.launches = 1;
  plan.images_a_launch = conv.x_size[0];
  plan.blocks = columns * std::min(of_column, rows_of(conv, tile));
  plan.workspace_bytes = parts_of(conv, runs_of(conv, tile, plan.blocks)).bytes;
  plan.cycles = cost(conv, tile, plan.blocks, gpu);
  return plan;
}

int run_conv_bn_stats_stem(const RfConvBnStats& problem, const RfConvPlan& plan, void* workspace,
                           void* stream) {
  const RfConvBnAct& conv = problem.conv;
  const int index = plan.configuration - kFirstStatsStem;
  const Facts tile = facts_at(index);
  ConvStatsStemArguments made{};
  const int error = encode_tensor_map(y_request(conv, tile), &made.y);
  if (error != 0) return error;
  const Strides x = used(conv.x_size, conv.x_stride);
  const Strides weight = used(conv.weight_size, conv.weight_stride);
  const OutputSize size = output_size(conv);
  StemArguments& image = made.image;
  image.x = conv.x;
  image.weight = conv.weight;
  image.image = StemImage::kWeights;
  image.channels = narrowed(conv.x_size[1]);
  image.height = narrowed(conv.x_size[2]);
  image.width = narrowed(conv.x_size[3]);
  image.filters = narrowed(conv.weight_size[0]);
  image.padding_h = narrowed(conv.padding[0]);
  image.padding_w = narrowed(conv.padding[1]);
  image.conv_height = narrowed(size.p);
  image.conv_width = narrowed(size.q);
  image.x_n = x.n, image.x_c = x.c, image.x_h = x.h, image.x_w = x.w;
  image.w_k = weight.n, image.w_c = weight.c, image.w_r = weight.h, image.w_s = weight.w;
  made.measured = runs_of(conv, tile, plan.blocks);
  place_parts(parts_of(conv, made.measured), problem, workspace, &made);
  const auto blocks = narrowed(plan.blocks / columns_of(conv));
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_stats_stem_float16 : launch_conv_bn_stats_stem_bfloat16;
  return launch(made, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(index), static_cast<void>(blocks), static_cast<void>(stream),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
