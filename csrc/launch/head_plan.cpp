// The table of the head's configurations, the pure function that picks one, and the arguments of a
// launch.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <string>

#include "conv_plan.h"
#include "conv_strides.h"
#include "head.h"
#include "head_tiles.h"

namespace resnet_fused {

// tools/_cuda_early.py knows the pointers of a kernel's parameters by these places.
static_assert(offsetof(HeadArguments, x) == 0);
static_assert(offsetof(HeadArguments, weight) == 8);
static_assert(offsetof(HeadArguments, bias) == 16);
static_assert(offsetof(HeadArguments, mean) == 24);
static_assert(offsetof(HeadArguments, out) == 32);

namespace {

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

const std::array<Entry, HeadShapes::kSize>& table() {
  static const std::array<Entry, HeadShapes::kSize> made = [] {
    std::array<Entry, HeadShapes::kSize> entries;
    for (int i = 0; i < HeadShapes::kSize; ++i) {
      entries[i] = HeadShapes::with(i, []<class Shape>() {
        return Entry{std::to_string(Shape::kM) + "x" + std::to_string(Shape::kN) + "_" +
                         std::to_string(Shape::kWarps) + "w",
                     {nullptr, 1, Shape::kM, Shape::kN, Shape::kWarps, 1, 1, Shape::kBlocks,
                      kHeadStep * 2, Shape::kSharedBytes, 0}};
      });
    }
    return entries;
  }();
  return made;
}

int64_t pitch_of(const RfHead& problem) {
  return std::max<int64_t>(1, divide_up(problem.x_size[1], kHeadChannels)) * kHeadChannels;
}

int32_t check(const RfHead& problem, const Refusal& refuse) {
  const auto dtype = static_cast<DataType>(problem.dtype);
  if (dtype != DataType::kBFloat16 && dtype != DataType::kFloat16) {
    return refuse("dtype %d; the kernels multiply bfloat16 and float16", problem.dtype);
  }
  const int64_t pixels = problem.x_size[2] * problem.x_size[3];
  constexpr int64_t kFar = int64_t{1} << 30;
  const auto inside = [](int64_t value) { return value >= 0 && value < kFar; };
  if (pixels < 1 || !inside(problem.x_size[2]) || !inside(problem.x_size[3]) || !inside(pixels) ||
      !inside(problem.x_size[0]) || !inside(problem.x_size[1]) || !inside(problem.classes)) {
    return refuse(
        "%lld images of %lld channels and %lld pixels, %lld classes; there is to be a pixel, and "
        "all are to be below 2^30",
        static_cast<Long>(problem.x_size[0]), static_cast<Long>(problem.x_size[1]),
        static_cast<Long>(pixels), static_cast<Long>(problem.classes));
  }
  // Blocks of a launch: along x 31 bits of them, along y 16.
  if (problem.x_size[0] * (pitch_of(problem) / kHeadChannels) > kMost ||
      problem.x_size[0] > 65535 * 16) {
    return refuse("%lld images of %lld channels are more than a launch can take",
                  static_cast<Long>(problem.x_size[0]), static_cast<Long>(problem.x_size[1]));
  }
  return 0;
}

// Cycles of the product, predicted: what a block reads from the cache, or the latency of its
// steps, of which two are in flight.
double cost(const RfHead& problem, const RfConvConfiguration& tile, const RfGpu& gpu) {
  const int64_t blocks = divide_up(problem.x_size[0], tile.m) * divide_up(problem.classes, tile.n);
  const double waves = static_cast<double>(divide_up(blocks, gpu.multiprocessors));
  const auto depth = static_cast<double>(pitch_of(problem));
  const double images = static_cast<double>(std::min<int64_t>(problem.x_size[0], tile.m));
  const double cache = (images + tile.n) * depth * 2 / kCacheBytes;
  const double latency = depth / kHeadStep / tile.warps_m * kLatency / 2;
  return waves * (2 * kLatency + std::max(cache, latency));
}

bool is_wide_weight(const RfHead& problem) {
  const int64_t unit = kChunkBytes / 2;
  return is_aligned(problem.weight) && problem.weight_stride[1] == 1 &&
         problem.weight_stride[0] % unit == 0 && problem.x_size[1] % unit == 0;
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_head_configurations(void) { return resnet_fused::HeadShapes::kSize; }

extern "C" const RfConvConfiguration* rf_head_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_head_plan(const RfHead* problem, const RfGpu* gpu, int32_t configuration,
                                int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check(*problem, refuse) != 0) return 1;
  if (check_wish(*gpu, configuration, HeadShapes::kSize, refuse) != 0) return 1;
  if (splits > 1) {
    return refuse("%d splits; the reduction is shared among a block's warps alone", splits);
  }
  const int64_t images = problem->x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * problem->classes == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  bool found = false;
  for (int i = 0; i < HeadShapes::kSize; ++i) {
    const RfConvConfiguration& tile = *rf_head_configuration(i);
    if (configuration >= 0 && i != configuration) continue;
    if (tile.shared_bytes > gpu->shared_per_block) continue;
    const double cycles = cost(*problem, tile, *gpu);
    if (found && cycles >= plan->cycles) continue;
    found = true;
    *plan =
        RfConvPlan{i,     1,      images * pitch_of(*problem) * 2,
                   1,     images, divide_up(images, tile.m) * divide_up(problem->classes, tile.n),
                   cycles};
  }
  plan->at_once = plan->blocks <= kResident * gpu->multiprocessors;
  if (!found) return refuse("too much shared memory for this GPU");
  std::snprintf(why, why_bytes, "%s: %s, %lld blocks on %d multiprocessors",
                rf_head_configuration(plan->configuration)->name,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors);
  return 0;
}

extern "C" int rf_head_cuda(const RfHead* problem, const RfConvPlan* plan, void* workspace,
                            void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const Strides x = used(problem->x_size, problem->x_stride);
  HeadArguments made{};
  made.x = problem->x;
  made.weight = problem->weight;
  made.bias = problem->bias;
  made.mean = workspace;
  made.out = problem->out;
  made.images = narrowed(problem->x_size[0]);
  made.channels = narrowed(problem->x_size[1]);
  made.pixels = narrowed(problem->x_size[2] * problem->x_size[3]);
  made.width = narrowed(problem->x_size[3]);
  made.classes = narrowed(problem->classes);
  made.pitch = narrowed(pitch_of(*problem));
  made.wide_weight = is_wide_weight(*problem);
  made.x_n = x.n, made.x_c = x.c, made.x_h = x.h, made.x_w = x.w;
  made.dependent = problem->flow.dependent != 0;
  made.follows = problem->flow.follows != 0;
  // The product follows the pooling wherever that lets it begin.
  if (made.dependent && plan->at_once != 0) {
    const int64_t size[2] = {problem->classes, problem->x_size[1]};
    made.prefetch_bytes = dense_bytes(size, problem->weight_stride, bytes_of(problem->dtype));
  }
  made.w_k = problem->weight_stride[0], made.w_c = problem->weight_stride[1];
  const bool wide = is_wide(problem->x, x, problem->x_size[1], bytes_of(problem->dtype));
  const auto launch = static_cast<DataType>(problem->dtype) == DataType::kBFloat16
                          ? launch_head_bfloat16
                          : launch_head_float16;
  return launch(made, plan->configuration, wide, stream);
}
