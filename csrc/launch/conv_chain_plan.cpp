// The table of conv_chain's configurations, and the pure function that picks one.
//
// The choice is the least predicted time, by the rates of conv_plan.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>

#include "conv_chain_arguments.h"
#include "conv_chain_tiles.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr int kTiles = ConvChainTiles::kSize;

// Bytes a cycle from L2 when all multiprocessors read the same filters. Not measured either.
constexpr double kSameLines = 45;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

template <class Shape>
Entry entry() {
  Entry made;
  made.name = std::to_string(Shape::kM) + "x" + std::to_string(Shape::kNext) + "_" +
              std::to_string(Shape::kWarpsM) + "w" + std::to_string(Shape::kStages) + "s";
  const ChainMemory memory = ChainMemory::of(Shape::kM, Shape::kNext, Shape::kStages, 2, true);
  made.configuration = {nullptr,
                        1,
                        Shape::kM,
                        Shape::kNext,
                        Shape::kWarpsM,
                        1,
                        Shape::kStages,
                        Shape::kBlocks,
                        Shape::kStepBytes,
                        memory.bytes,
                        0};
  return made;
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = 0; i < kTiles; ++i) {
      entries[i] = ConvChainTiles::with(i, []<class Shape>() { return entry<Shape>(); });
    }
    return entries;
  }();
  return made;
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit, or all that is moved at memory's rate. Blocks that share a multiprocessor hide each
// other's latency.
double cost(const RfConvChain& problem, const RfConvConfiguration& tile, int64_t pixels,
            const RfGpu& gpu) {
  const ChainMemory memory = chain_memory(problem, tile);
  const double m = tile.m;
  const double steps = static_cast<double>(divide_up(problem.channels, kChainStep));
  const double slabs = memory.rows / (m * kChainStepBytes);
  const double next = problem.next_channels > 0 ? tile.n : 0;
  const double slices = kChainStepBytes / 32.0;
  const auto blocks = static_cast<double>(divide_up(pixels, tile.m));
  const double busy = std::ceil(blocks / gpu.multiprocessors);
  const double resident = std::min(
      {busy, static_cast<double>(tile.blocks),
       std::max(1.0, static_cast<double>(gpu.shared_per_multiprocessor / (memory.bytes + 1024)))});
  // Of a step: both products; what warps read, each all filters; what comes and goes.
  const double matrix = slices * 16 * m * (kChainStep * slabs + next) / kMatrixUnit;
  const double row = kChainStepBytes;  // a step of a row
  const double read = slabs * row * (m + kChainStep * tile.warps_m) + row * next * tile.warps_m;
  const double passed = row * m * (memory.tile != 0 ? 3 : 2);
  const double come = memory.stage + memory.tile;
  const double shared = (read + passed + come) / kSharedBytes;
  const double stored = row * m / static_cast<double>(problem.out_stride * problem.out_stride);
  const double cache = memory.stage / kSameLines + (memory.tile + stored) / kCacheBytes;
  const double latency = kLatency / ((tile.stages - 1) * resident);
  const double loop = steps * std::max({matrix, shared, cache, latency});
  const double moved = memory.rows + steps * (memory.tile + stored) +
                       m * 2 * static_cast<double>(problem.next_channels);
  const double ends =
      (memory.rows + m * 2 * static_cast<double>(problem.next_channels)) / kMemoryBytes +
      2 * kLatency;
  return std::max(busy * (loop + ends / resident), busy * moved / kMemoryBytes);
}

// Sizes that no launch takes.
int32_t check_chain(const RfConvChain& problem, const Refusal& refuse) {
  const int64_t sizes[] = {problem.x_size[0],          problem.x_size[1],
                           problem.x_size[2],          problem.x_size[3],
                           problem.channels,           problem.next_channels,
                           problem.projected_channels, problem.projection_stride};
  for (const int64_t size : sizes) {
    if (size < 0 || size > kMost) {
      return refuse("sizes run from 0 to %lld; there is one of %lld", static_cast<Long>(kMost),
                    static_cast<Long>(size));
    }
  }
  constexpr int64_t kFar = int64_t{1} << 30;
  if (problem.x_size[2] * problem.projection_stride >= kFar ||
      problem.x_size[3] * problem.projection_stride >= kFar) {
    return refuse("a projection's image of more than 2^30 rows or columns");
  }
  switch (static_cast<DataType>(problem.dtype)) {
    case DataType::kBFloat16:
    case DataType::kFloat16:
      break;
    default:
      return refuse(
          "dtype %d; bfloat16 and float16 are served: sums of 16 bits alone can be multiplied on "
          "as they lie in registers",
          problem.dtype);
  }
  if (problem.x_size[1] < 1 || problem.channels < 1) {
    return refuse("%lld channels of x, %lld of out; from 1 on are possible",
                  static_cast<Long>(problem.x_size[1]), static_cast<Long>(problem.channels));
  }
  if (problem.projects != 0 && (problem.projected_channels < 1 || problem.projection_stride < 1)) {
    return refuse("a projection of %lld channels, stride %lld; from 1 on are possible",
                  static_cast<Long>(problem.projected_channels),
                  static_cast<Long>(problem.projection_stride));
  }
  if (problem.out_stride < 1 || problem.out_stride > 2) {
    return refuse("an out_stride of %lld; 1 and 2 are possible",
                  static_cast<Long>(problem.out_stride));
  }
  return 0;
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_chain_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_conv_chain_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_conv_chain_plan(const RfConvChain* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check_chain(*problem, refuse) != 0) return 1;
  if (check_wish(*gpu, configuration, kTiles, refuse) != 0) return 1;
  if (splits < 0 || splits > 1) return refuse("%d splits; a chain is not split", splits);
  const int64_t images = problem->x_size[0];
  const int64_t of_image = problem->x_size[2] * problem->x_size[3];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (images * of_image == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  if (const char* name = not_wide(*problem); name != nullptr) {
    return refuse("%s cannot be moved 16 bytes at a time", name);
  }
  const int64_t together =
      std::min({images, kMost / std::max<int64_t>(of_image, 1), images_in_reach(*problem)});
  if (together < 1) return refuse("one image is more than a launch can take");

  char against[96] = "";
  bool found = false;
  for (int i = 0; i < kTiles; ++i) {
    const RfConvConfiguration& tile = *rf_conv_chain_configuration(i);
    if (configuration >= 0 && i != configuration) continue;
    const int32_t bytes = chain_memory(*problem, tile).bytes;
    if (problem->next_channels > tile.n) {
      std::snprintf(against, sizeof against, "%lld channels of next, at most %d fit",
                    static_cast<Long>(problem->next_channels), tile.n);
      continue;
    }
    if (bytes > gpu->shared_per_block) {
      std::snprintf(against, sizeof against,
                    "its tiles take %d bytes of shared memory, %d are there", bytes,
                    gpu->shared_per_block);
      continue;
    }
    const double cycles = cost(*problem, tile, together * of_image, *gpu);
    if (found && cycles >= plan->cycles) continue;
    found = true;
    *plan = RfConvPlan{
        i,     1, 0, divide_up(images, together), together, divide_up(together * of_image, tile.m),
        cycles};
  }
  if (!found) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against);
    return refuse("configuration %d (%s): %s", configuration,
                  rf_conv_chain_configuration(configuration)->name, against);
  }
  std::snprintf(why, why_bytes, "%s: %s, %lld blocks on %d multiprocessors",
                rf_conv_chain_configuration(plan->configuration)->name,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors);
  return 0;
}
