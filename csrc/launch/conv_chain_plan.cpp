// The table of conv_chain's configurations, and the pure function that picks one.
//
// The choice is the least predicted time, by the rates of conv_plan.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>

#include "conv_chain_arguments.h"
#include "conv_chain_rates.h"
#include "conv_chain_tiles.h"
#include "conv_chain_tma.h"
#include "conv_chain_window.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr int kTiles = kFirstChainWindow + ConvChainWindowTiles::kSize;

// Pixels of a row that a window of 32 bits of bytes is sure to reach over.
constexpr int64_t kWidest = int64_t{1} << 20;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
  int32_t front;
};

template <class Shape>
Entry entry() {
  Entry made;
  made.name = std::to_string(Shape::kM) + "x" + std::to_string(Shape::kNext) + "_" +
              std::to_string(Shape::kWarpsM) + "w" + std::to_string(Shape::kStages) + "s";
  if (Shape::kFront > 0) made.name += "_front" + std::to_string(Shape::kFront);
  made.front = Shape::kFront;
  const ChainMemory memory = ChainMemory::of(Shape::kM, Shape::kNext, Shape::kStages, Shape::kFront,
                                             {2, 0, Shape::kFront > 0 ? 2 : 0, 56, true});
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

// A configuration by TMA.
Entry tma_entry(std::string name, int32_t front, int32_t next, int32_t stages,
                int32_t shared_bytes) {
  Entry made;
  made.name = std::move(name);
  made.front = front;
  made.configuration = chain_tma_configuration(next, stages, shared_bytes);
  return made;
}

Entry tma_entry(int index) {
  if (index < kFirstChainWindow) {
    const ChainTmaFacts tile = chain_tma_tile(index - kFirstChainTma);
    return tma_entry(chain_tma_name(tile), 0, tile.next, tile.stages, tile.shared_bytes);
  }
  const ChainWindowFacts tile = chain_window_tile(index - kFirstChainWindow);
  const int64_t width = 56 * kChainFront / tile.front;  // of ResNet's images of so many channels
  return tma_entry(chain_window_name(tile), tile.front, tile.next, tile.stages,
                   narrowed(chain_window_shared_bytes(tile, width)));
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = kFirstChainTma; i < kTiles; ++i) entries[i] = tma_entry(i);
    for (int i = 0; i < kFirstChainTma; ++i) {
      entries[i] = ConvChainTiles::with(i, []<class Shape>() { return entry<Shape>(); });
    }
    return entries;
  }();
  return made;
}

// A configuration with a problem's sizes.
struct Fitted {
  const RfConvConfiguration& tile;
  int32_t front;  // channels that it has room for in front
  ChainSizes sizes;
  ChainMemory memory;
  double busy;      // blocks of the busiest multiprocessor
  double resident;  // that share it at a time

  Fitted(const RfConvChain& problem, int32_t index, int64_t pixels, const RfGpu& gpu)
      : tile(*rf_conv_chain_configuration(index)),
        front(chain_front(index)),
        sizes(chain_sizes(problem)),
        memory(chain_memory(problem, index)),
        busy(std::ceil(static_cast<double>(divide_up(pixels, tile.m)) / gpu.multiprocessors)),
        resident(std::min({busy, static_cast<double>(tile.blocks),
                           std::max(1.0, static_cast<double>(gpu.shared_per_multiprocessor /
                                                             (memory.bytes + 1024)))})) {}
};

constexpr double kRow = kChainStepBytes;  // a step of a row
constexpr double kSlices = kChainStepBytes / 32.0;

// Cycles of `steps` equal ones that wait for a latency each; of a step: cycles of products, bytes
// that pass through shared memory, cycles of L2.
double loop_of(const Fitted& of, double steps, double matrix, double shared, double cache) {
  const double latency = kLatency / ((of.tile.stages - 1) * of.resident);
  return steps * std::max({matrix, shared / kSharedBytes, cache, latency});
}

// The steps of the convolution in front, a row of taps each: the window comes once, pixels before
// and behind the tile with it, from L2.
double front_loop(const Fitted& of) {
  const double m = of.tile.m;
  const double filters = kFrontTaps * kRow * of.front;
  const double window = static_cast<double>(of.memory.window) / kFrontTaps;
  return loop_of(of, kFrontTaps * of.sizes.front_slabs,
                 kSlices * 16 * m * of.front * kFrontTaps / kMatrixUnit,
                 kFrontTaps * kRow * m + filters * (of.tile.warps_m + 1) + window,
                 filters / kSameLines + window / kCacheBytes);
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit, or all that is moved at memory's rate. Blocks that share a multiprocessor hide each
// other's latency.
double cost(const RfConvChain& problem, int32_t index, int64_t pixels, const RfGpu& gpu) {
  const Fitted of(problem, index, pixels, gpu);
  const double m = of.tile.m;
  const double warps = of.tile.warps_m;
  const double steps = static_cast<double>(divide_up(problem.channels, kChainStep));
  const double slabs = of.sizes.x_slabs + of.sizes.projected_slabs;
  const double next = problem.next_channels > 0 ? of.tile.n : 0;
  // Of a step: both products; what warps read, each all filters; what comes and goes.
  const double matrix = kSlices * 16 * m * (kChainStep * slabs + next) / kMatrixUnit;
  const double read = slabs * kRow * (m + kChainStep * warps) + kRow * next * warps;
  const double shortcut = of.sizes.shortcut ? kRow * m : 0;
  const double passed = 2 * kRow * m + shortcut;
  const double filters =
      kRow * (kChainStep * slabs + of.tile.n) + kChainVectors * kChainStep * sizeof(float);
  const double stored = kRow * m / static_cast<double>(problem.out_stride * problem.out_stride);
  double loop = loop_of(of, steps, matrix, read + passed + filters + shortcut,
                        filters / kSameLines + (shortcut + stored) / kCacheBytes);
  if (of.front > 0) loop += front_loop(of);
  const double rows =
      kRow * m *
      ((of.front > 0 ? of.sizes.front_slabs : of.sizes.x_slabs) + of.sizes.projected_slabs);
  const double after = m * 2 * static_cast<double>(problem.next_channels);
  const double moved = rows + steps * (shortcut + stored) + after;
  const double ends = (rows + after) / kMemoryBytes + 2 * kLatency;
  return std::max(of.busy * (loop + ends / of.resident), of.busy * moved / kMemoryBytes);
}

// Blocks of a launch over so many images, and its predicted cycles.
struct Predicted {
  int64_t blocks;
  double cycles;
};
Predicted predicted(const RfConvChain& problem, int32_t index, int64_t images, const RfGpu& gpu) {
  if (index >= kFirstChainWindow) {
    const ChainWindowFacts tile = chain_window_tile(index - kFirstChainWindow);
    return {chain_window_blocks(problem, tile, images, gpu),
            chain_window_cost(problem, tile, images, gpu)};
  }
  const int64_t pixels = images * problem.x_size[2] * problem.x_size[3];
  if (index < kFirstChainTma) {
    const int64_t tiles = divide_up(pixels, rf_conv_chain_configuration(index)->m);
    return {tiles, cost(problem, index, pixels, gpu)};
  }
  // By TMA blocks stay for many tiles, one on a multiprocessor.
  const ChainTmaFacts tile = chain_tma_tile(index - kFirstChainTma);
  return {chain_tma_blocks(tile, pixels, gpu), chain_tma_cost(problem, tile, pixels, gpu)};
}

}  // namespace

int32_t check_chain(const RfConvChain& problem, const Refusal& refuse) {
  const int64_t sizes[] = {
      problem.x_size[0],          problem.x_size[1],         problem.x_size[2],
      problem.x_size[3],          problem.channels,          problem.next_channels,
      problem.projected_channels, problem.projection_stride, problem.front_channels};
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

namespace {

int32_t check_chain_dtype(const RfConvChain& problem, const Refusal& refuse) {
  switch (static_cast<DataType>(problem.dtype)) {
    case DataType::kBFloat16:
    case DataType::kFloat16:
      return 0;
    default:
      return refuse(
          "dtype %d; bfloat16 and float16 are served: sums of 16 bits alone can be multiplied on "
          "as they lie in registers",
          problem.dtype);
  }
}

// Why a configuration can't take so many images of a problem a launch, into `why`; false if it can.
bool refused(const RfConvChain& problem, int32_t index, int64_t images, const RfGpu& gpu,
             const Refusal& refuse) {
  const RfConvConfiguration& tile = *rf_conv_chain_configuration(index);
  if (tile.tma != 0) {
    const auto fault =
        index < kFirstChainWindow
            ? chain_tma_fault(problem, chain_tma_tile(index - kFirstChainTma), images, gpu)
            : chain_window_fault(problem, chain_window_tile(index - kFirstChainWindow), images,
                                 gpu);
    return !fault.empty() && refuse("%s", fault.c_str()) != 0;
  }
  const int32_t front = chain_front(index);
  if ((front > 0) != (problem.front_channels > 0)) {
    return refuse(front > 0 ? "it is made for a 3x3 convolution in front"
                            : "it takes no 3x3 convolution in front") != 0;
  }
  if (problem.front_channels > front) {
    return refuse("%lld channels of the convolution in front, at most %d fit",
                  static_cast<Long>(problem.front_channels), front) != 0;
  }
  if (problem.next_channels > tile.n) {
    return refuse("%lld channels of next, at most %d fit", static_cast<Long>(problem.next_channels),
                  tile.n) != 0;
  }
  if (problem.front_channels > 0 && problem.x_size[3] > kWidest) {
    return refuse("a convolution in front of rows of %lld pixels; at most %lld are possible",
                  static_cast<Long>(problem.x_size[3]), static_cast<Long>(kWidest)) != 0;
  }
  const int32_t bytes = chain_memory(problem, index).bytes;
  if (bytes > gpu.shared_per_block) {
    return refuse("its tiles take %d bytes of shared memory, %d are there", bytes,
                  gpu.shared_per_block) != 0;
  }
  return false;
}

}  // namespace

int32_t chain_front(int32_t configuration) {
  return table()[static_cast<size_t>(configuration)].front;
}

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
  if (check_chain(*problem, refuse) != 0 || check_chain_dtype(*problem, refuse) != 0) return 1;
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
  const int64_t together = chain_images(*problem);
  if (together < 1) return refuse("one image is more than a launch can take");

  constexpr size_t kSaid = 160;
  char against[kSaid] = "";
  char against_tma[kSaid] = "";
  char aside[kSaid];
  bool found = false;
  for (int i = 0; i < kTiles; ++i) {
    const RfConvConfiguration& tile = *rf_conv_chain_configuration(i);
    if (configuration >= 0 && i != configuration) continue;
    // What is said of the whole table is said by the last one that might have served.
    const bool other = (chain_front(i) > 0) != (problem->front_channels > 0);
    char* said = other ? aside : tile.tma != 0 ? against_tma : against;
    if (refused(*problem, i, together, *gpu, {configuration < 0 ? said : against, kSaid})) continue;
    const auto [blocks, cycles] = predicted(*problem, i, together, *gpu);
    if (found && cycles >= plan->cycles) continue;
    found = true;
    *plan = RfConvPlan{i, 1, 0, divide_up(images, together), together, blocks, cycles};
  }
  if (!found) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against);
    return refuse("configuration %d (%s): %s", configuration,
                  rf_conv_chain_configuration(configuration)->name, against);
  }
  plan->at_once = plan->blocks <= kResident * gpu->multiprocessors;
  // Of a GPU that has no TMA nothing is said.
  const bool missed = configuration < 0 && gpu->capability == 90 && against_tma[0] != 0 &&
                      plan->configuration < kFirstChainTma;
  std::snprintf(why, why_bytes, "%s: %s, %lld blocks on %d multiprocessors%s%s",
                rf_conv_chain_configuration(plan->configuration)->name,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors, missed ? "; no TMA: " : "",
                missed ? against_tma : "");
  return 0;
}
