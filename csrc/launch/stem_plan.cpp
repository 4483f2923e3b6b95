// The table of the stem's configurations, the pure function that picks one and its strips, and the
// arguments of a launch.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <string>

#include "conv_plan.h"
#include "conv_strides.h"
#include "stem.h"
#include "stem_tiles.h"
#include "stem_wgmma.h"
#include "tma_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows the pointers of a kernel's parameters by these places.
static_assert(offsetof(StemArguments, x) == 0);
static_assert(offsetof(StemArguments, weight) == 8);
static_assert(offsetof(StemArguments, scale) == 16);
static_assert(offsetof(StemArguments, shift) == 24);
static_assert(offsetof(StemArguments, norm) == 32);
static_assert(offsetof(StemArguments, out) == 40);

namespace {

constexpr int64_t kPoolKernel = 3;
constexpr int64_t kPoolStride = 2;
constexpr int64_t kPoolPadding = 1;
// Cycles from a block's start until its warps hold the filters, and between two rows of the
// convolution: the barrier, the pooling, the first loads of fragments.
constexpr double kFilters = 4000;
constexpr double kRow = 150;
// Beyond, a single image has blocks for every multiprocessor.
constexpr int64_t kMostStrips = 1024;
constexpr int32_t kFirstE4M3 = 89;  // 10 times the capability

constexpr int kTiles = kFirstStemWgmma + StemWgmmaShapes::kSize;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Shape>
Entry entry() {
  constexpr int kWarps = Shape::kThreads / 32;
  return Entry{
      std::to_string(Shape::kPooled) + "x" + std::to_string(kStemFilters) + "_" +
          std::to_string(kWarps) + "w",
      {nullptr, 1, Shape::kColumns, kStemFilters, Shape::kColumnWarps, kWarps / Shape::kColumnWarps,
       Shape::kPairs, Shape::kBlocks, Shape::kRowBytes, Shape::kSharedBytes, 0}};
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = 0; i < kFirstStemWgmma; ++i) {
      entries[i] = StemShapes::with(i, []<class Shape>() { return entry<Shape>(); });
    }
    for (int i = kFirstStemWgmma; i < kTiles; ++i) {
      const int index = i - kFirstStemWgmma;
      entries[i] = {stem_wgmma_name(index), stem_wgmma_configuration(index)};
    }
    return entries;
  }();
  return made;
}

// Tiles along a row of the pooled image.
int64_t tiles_of(int configuration, int64_t out_width) {
  if (configuration >= kFirstStemWgmma) {
    return stem_wgmma_tiles(configuration - kFirstStemWgmma, out_width);
  }
  return StemShapes::with(configuration, [out_width]<class Shape>() {
    return divide_up(out_width, int64_t{Shape::kPooled});
  });
}

struct StemSize {
  int64_t conv[2];
  int64_t out[2];
};

StemSize size_of(const RfStem& problem) {
  StemSize size{};
  for (int d = 0; d < 2; ++d) {
    const int64_t room = problem.x_size[2 + d] + 2 * problem.padding[d] - kStemTaps;
    size.conv[d] = room < 0 ? 0 : room / kStemStride + 1;
    size.out[d] = size.conv[d] == 0 ? 0 : (size.conv[d] - 1) / kPoolStride + 1;
  }
  return size;
}

bool both_are(const int64_t (&pair)[2], int64_t value) {
  return pair[0] == value && pair[1] == value;
}

// What the kernel is not made for.
int32_t check(const RfStem& problem, const Refusal& refuse) {
  const auto dtype = static_cast<DataType>(problem.dtype);
  if (dtype != DataType::kBFloat16 && dtype != DataType::kFloat16) {
    return refuse(
        "dtype %d; the kernel multiplies bfloat16 and float16: in float32 the weights "
        "would exceed a warp's registers",
        problem.dtype);
  }
  if (problem.out_dtype != problem.dtype && problem.out_dtype != kFloat8E4M3) {
    return refuse("out: dtype %d beside a weight of %d; that, or e4m3, is served",
                  problem.out_dtype, problem.dtype);
  }
  const auto& weight = problem.weight_size;
  if (weight[2] != kStemTaps || weight[3] != kStemTaps || !both_are(problem.stride, kStemStride)) {
    return refuse(
        "a filter of %lld x %lld with stride %lld x %lld; the kernel is made for 7 x 7 "
        "with stride 2",
        static_cast<Long>(weight[2]), static_cast<Long>(weight[3]),
        static_cast<Long>(problem.stride[0]), static_cast<Long>(problem.stride[1]));
  }
  if (!both_are(problem.pool_kernel, kPoolKernel) || !both_are(problem.pool_stride, kPoolStride) ||
      !both_are(problem.pool_padding, kPoolPadding)) {
    return refuse("the kernel is made for pooling 3 x 3 with stride 2 and padding 1");
  }
  if (weight[1] < 1 || weight[1] > kStemChannels || problem.x_size[1] != weight[1]) {
    return refuse("%lld channels by a weight of %lld; 1 to %d are possible",
                  static_cast<Long>(problem.x_size[1]), static_cast<Long>(weight[1]),
                  kStemChannels);
  }
  constexpr int64_t kFar = int64_t{1} << 29;  // twice a position stays in 32 bits
  const auto inside = [](int64_t value) { return value >= 0 && value < kFar; };
  for (int d = 0; d < 2; ++d) {
    if (!inside(problem.x_size[2 + d]) || !inside(problem.padding[d])) {
      return refuse("%lld pixels with padding %lld along dimension %d; positions end below 2^29",
                    static_cast<Long>(problem.x_size[2 + d]), static_cast<Long>(problem.padding[d]),
                    2 + d);
    }
  }
  if (!inside(problem.x_size[0]) || !inside(weight[0])) {
    return refuse("%lld images, %lld filters; both are to be below 2^29",
                  static_cast<Long>(problem.x_size[0]), static_cast<Long>(weight[0]));
  }
  return 0;
}

int64_t filter_blocks(const RfStem& problem) {
  return divide_up(problem.weight_size[0], kStemFilters);
}

int64_t resident_blocks(const RfConvConfiguration& tile, const RfGpu& gpu) {
  return std::max<int64_t>(
      1, std::min(tile.blocks, gpu.shared_per_multiprocessor / (tile.shared_bytes + 1024)));
}

// What keeps a configuration from a GPU, or null.
const char* unfit(const RfConvConfiguration& tile, const RfGpu& gpu) {
  if (tile.tma != 0 && gpu.capability != 90) return "wgmma is for GPUs of capability 9.0";
  if (tile.tma != 0 && !kBuiltForSm90a) return "this build holds no machine code for sm_90a";
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  return nullptr;
}

// Cycles, predicted: blocks that share a multiprocessor also share its tensor cores; each row of a
// block takes a load's latency at least.
double cost(int configuration, int64_t items, int64_t rows, int64_t resident, const RfGpu& gpu) {
  if (configuration >= kFirstStemWgmma) {
    return stem_wgmma_cost(configuration - kFirstStemWgmma, items, rows, gpu);
  }
  const RfConvConfiguration& tile = *rf_stem_configuration(configuration);
  const int64_t each = divide_up(items, gpu.multiprocessors);  // items of a multiprocessor
  const double together = static_cast<double>(std::min(each, resident));
  // 16 columns at a time, of which the tile's own are seven eighths.
  const double products = (tile.m - 2.0) / 14 * 16 * tile.n * kStemTaps * 32;
  const double row = std::max(products / kMatrixUnit * together, kLatency) + kRow;
  const double waves = static_cast<double>(divide_up(each, std::min(each, resident)));
  return kFilters + waves * (2 * kLatency + (2.0 * static_cast<double>(rows) + 1) * row);
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_stem_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_stem_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_stem_plan(const RfStem* problem, const RfGpu* gpu, int32_t configuration,
                                int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check(*problem, refuse) != 0) return 1;
  if (problem->out_dtype == kFloat8E4M3 && gpu->capability < kFirstE4M3) {
    return refuse("out: GPUs of capability 8.9 are the first that convert to e4m3");
  }
  if (check_wish(*gpu, configuration, kTiles, refuse) != 0) return 1;
  const StemSize size = size_of(*problem);
  const int64_t images = problem->x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * problem->weight_size[0] * size.out[0] * size.out[1] == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  const int64_t blocks_n = filter_blocks(*problem);
  const char* against = nullptr;
  bool found = false;
  for (int i = 0; i < kTiles; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const RfConvConfiguration& tile = *rf_stem_configuration(i);
    if (const char* reason = unfit(tile, *gpu)) {
      // Of a GPU that has no wgmma nothing is said, unless it is asked for.
      if (tile.tma == 0 || configuration >= 0) against = reason;
      continue;
    }
    const int64_t tiles = tiles_of(i, size.out[1]);
    const int64_t resident = resident_blocks(tile, *gpu);
    const int64_t most = splits > 0 ? splits : std::min<int64_t>(size.out[0], kMostStrips);
    for (int64_t strips = splits > 0 ? splits : 1; strips <= most; ++strips) {
      const int64_t rows = divide_up(size.out[0], strips);
      const int64_t items = images * strips * tiles;
      if (!has_work(size.out[0], strips) || items > kMost || blocks_n > 65535) {
        if (splits > 0 || strips == 1) against = "no such strips, or more than a launch can take";
        continue;
      }
      const double cycles = cost(i, items * blocks_n, rows, resident, *gpu);
      if (found && cycles >= plan->cycles) continue;
      found = true;
      const int64_t room = std::max<int64_t>(1, gpu->multiprocessors * resident / blocks_n);
      *plan = RfConvPlan{i,      static_cast<int32_t>(strips),     0,     1,
                         images, std::min(items, room) * blocks_n, cycles};
    }
  }
  if (!found) {
    return refuse("configuration %d, %d strips: %s", configuration, splits, against);
  }
  std::snprintf(why, why_bytes, "%s, %d strips an image: %s, %lld blocks on %d multiprocessors",
                rf_stem_configuration(plan->configuration)->name, plan->splits,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors);
  return 0;
}

extern "C" int rf_stem_cuda(const RfStem* problem, const RfConvPlan* plan, void* /*workspace*/,
                            void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const StemSize size = size_of(*problem);
  const Strides x = used(problem->x_size, problem->x_stride);
  const Strides weight = used(problem->weight_size, problem->weight_stride);
  const int64_t out_size[4] = {problem->x_size[0], problem->weight_size[0], size.out[0],
                               size.out[1]};
  const Strides out = used(out_size, problem->out_stride);
  StemArguments made{};
  made.x = problem->x;
  made.weight = problem->weight;
  made.scale = static_cast<const float*>(problem->scale);
  made.shift = static_cast<const float*>(problem->shift);
  made.norm = static_cast<const float*>(problem->input_norm);
  made.out = problem->out;
  made.image = static_cast<StemImage>(problem->image);
  made.channels = narrowed(problem->x_size[1]);
  made.height = narrowed(problem->x_size[2]);
  made.width = narrowed(problem->x_size[3]);
  made.filters = narrowed(problem->weight_size[0]);
  made.padding_h = narrowed(problem->padding[0]);
  made.padding_w = narrowed(problem->padding[1]);
  made.conv_height = narrowed(size.conv[0]);
  made.conv_width = narrowed(size.conv[1]);
  made.out_height = narrowed(size.out[0]);
  made.out_width = narrowed(size.out[1]);
  made.tiles = narrowed(tiles_of(plan->configuration, size.out[1]));
  made.strips = plan->splits;
  made.rows = narrowed(divide_up(size.out[0], plan->splits));
  made.items = narrowed(problem->x_size[0] * made.strips * made.tiles);
  made.quantised = problem->out_dtype == kFloat8E4M3;
  made.out_factor = problem->out_factor;
  made.wide_out = is_wide(problem->out, out, problem->weight_size[0],
                          made.quantised ? 1 : bytes_of(problem->dtype));
  made.x_n = x.n, made.x_c = x.c, made.x_h = x.h, made.x_w = x.w;
  made.dependent = problem->flow.dependent != 0;
  made.follows = problem->flow.follows != 0;
  made.w_k = weight.n, made.w_c = weight.c, made.w_r = weight.h, made.w_s = weight.w;
  made.out_n = out.n, made.out_c = out.c, made.out_h = out.h, made.out_w = out.w;
  const auto blocks = narrowed(plan->blocks / filter_blocks(*problem));
  const bool half = static_cast<DataType>(problem->dtype) == DataType::kFloat16;
  if (plan->configuration >= kFirstStemWgmma) {
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
    const auto launch = half ? launch_stem_wgmma_float16 : launch_stem_wgmma_bfloat16;
    return launch(made, plan->configuration - kFirstStemWgmma, blocks, stream);
#else
    constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
    return kNoKernelImage;
#endif
  }
  const auto launch = half ? launch_stem_float16 : launch_stem_bfloat16;
  return launch(made, plan->configuration, blocks, stream);
}
