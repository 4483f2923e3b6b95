// The tables of the gradients' configurations, and the pure functions that pick one and its splits.
//
// The choice is the least predicted time, as for conv_bn_act.
#include <algorithm>
#include <array>
#include <string>

#include "conv_gradient_arguments.h"
#include "conv_gradient_tiles.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

// Instructions to widen, scale, mask and round an element of dy.
constexpr double kMaskInstructions = 6;
// Cycles that a block waits in a step's masking: a load from shared memory, a store, the barrier.
constexpr double kMaskLatency = 100;
// conv_dgrad: beyond, the parts of these networks' reductions are a step or two long.
constexpr int kMostDgradSplits = 32;
// conv_wgrad: a result of one tile still fills the largest GPUs twice.
constexpr int kMostWgradSplits = 512;

template <class WideTiles, class NarrowTiles>
struct Table {
  static constexpr int kSize = WideTiles::kSize + NarrowTiles::kSize;

  static const RfConvConfiguration* at(int32_t index) {
    if (index < 0 || index >= kSize) return nullptr;
    static const Table table;
    return &table.entries_[index];
  }

 private:
  Table() {
    for (int i = 0; i < kSize; ++i) {
      const bool wide = i < WideTiles::kSize;
      const auto fill = [&]<class Shape>() {
        names_[i] = std::string(wide ? "" : "narrow_") + std::to_string(Shape::kM) + "x" +
                    std::to_string(Shape::kN) + "_" + std::to_string(Shape::kThreads / 32) + "w" +
                    std::to_string(Shape::kStages) + "s";
        entries_[i] = {names_[i].c_str(),
                       wide,
                       Shape::kM,
                       Shape::kN,
                       Shape::kWarpsM,
                       Shape::kWarpsN,
                       Shape::kStages,
                       Shape::kBlocks,
                       Shape::kStepBytes,
                       Shape::kRingBytes,
                       kOutputFits<float, Shape>};
      };
      if (wide) {
        WideTiles::with(i, fill);
      } else {
        NarrowTiles::with(i - WideTiles::kSize, fill);
      }
    }
  }

  std::array<std::string, kSize> names_;
  std::array<RfConvConfiguration, kSize> entries_;
};
using DgradTable = Table<DgradWideTiles, DgradNarrowTiles>;
using WgradTable = Table<WgradWideTiles, WgradNarrowTiles>;

// The matrix product that a gradient is.
struct Product {
  int64_t rows;  // of one launch and one phase
  int64_t columns;
  int64_t copies;  // groups, times phases
  double depth;    // of the reduction; the phases' mean
  int64_t bytes;   // of an element
  bool wide;
  bool masked;
};

int64_t tiles_of(const Product& product, const RfConvConfiguration& tile) {
  return divide_up(product.rows, tile.m) * divide_up(product.columns, tile.n) * product.copies;
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit. See conv_bn_act_plan.cpp; here dy is read, masked and written back in shared memory,
// and y comes beside it.
double cost(const Product& product, const RfConvConfiguration& tile, int64_t splits,
            const RfGpu& gpu) {
  const double busy =
      static_cast<double>(divide_up(tiles_of(product, tile) * splits, gpu.multiprocessors));
  const double bytes = static_cast<double>(product.bytes);
  const double steps =
      std::max(1.0, product.depth * bytes / tile.step_bytes) / static_cast<double>(splits);
  const double resident =
      std::min({busy, static_cast<double>(tile.blocks),
                std::max(1.0, static_cast<double>(gpu.shared_per_multiprocessor /
                                                  (tile.shared_bytes + 1024)))});
  const double area = static_cast<double>(tile.m) * tile.n;
  const double left = static_cast<double>(tile.m) * tile.step_bytes;
  const double asked =
      left * (product.masked ? 2 : 1) + static_cast<double>(tile.n) * tile.step_bytes;
  const double slices = tile.step_bytes / 32.0;
  const double matrix = slices * area * 16 / kMatrixUnit;
  const double read = slices * 32.0 * (tile.m * tile.warps_n + tile.n * tile.warps_m);
  const double shared = (read + asked + left * (product.masked ? 3 : 2)) / kSharedBytes;
  const double cache = asked / kCacheBytes;
  const double latency = kLatency / ((tile.stages - 1) * resident);
  const double narrow = tile.wide != 0 ? 0 : asked * kNarrowInstructions / bytes / kInstructions;
  const double masking = left * kMaskInstructions / bytes / kInstructions;
  // While a block masks what has landed, only its neighbours multiply.
  const double pause = (masking + kMaskLatency) / resident;
  const double step = std::max({matrix, shared, cache, latency, narrow + masking}) + pause;
  const double loop = steps * step;
  const double ends = area * bytes / kMemoryBytes;
  const double hidden = std::min(loop, ends) + kLatency;
  return busy * (std::max(loop, ends) + hidden / resident);
}

int32_t check_products(const RfConvGradient& problem, const Refusal& refuse) {
  const int64_t columns = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
  const int64_t taps = problem.weight_size[0] * problem.weight_size[2] * problem.weight_size[3];
  if (columns > kMost || taps > kMost) {
    return refuse("filters of %lld elements, %lld taps of all filters; up to %lld are possible",
                  static_cast<Long>(columns), static_cast<Long>(taps), static_cast<Long>(kMost));
  }
  return 0;
}

// What keeps a configuration from a product; null if nothing.
const char* unfit(const RfConvConfiguration& tile, const Product& product, const RfGpu& gpu) {
  if (tile.shared_bytes > gpu.shared_per_block) return "too much shared memory for this GPU";
  if (product.bytes == 4 && tile.float32 == 0) return "its output tile in float32 does not fit";
  if (tile.wide != 0 && !product.wide) return "its operands cannot be read 16 bytes at a time";
  return nullptr;
}

// A gradient's part of the choice. For a tile: the product of one launch, and its images; or null
// and why not.
struct Chooser {
  const RfConvGradient& problem;
  const RfGpu& gpu;

  bool empty() const {
    const OutputSize size = output_size(problem);
    return problem.x_size[0] * problem.x_size[1] * problem.x_size[2] * problem.x_size[3] == 0 ||
           problem.weight_size[0] * problem.weight_size[2] * problem.weight_size[3] *
                   problem.weight_size[1] * size.p * size.q ==
               0;
  }
  Product common() const {
    Product product{};
    product.bytes = static_cast<DataType>(problem.dtype) == DataType::kFloat32 ? 4 : 2;
    product.masked = problem.y != nullptr;
    return product;
  }
};

struct DgradChooser : Chooser {
  static constexpr int kMostSplits = kMostDgradSplits;

  static const RfConvConfiguration* tile(int32_t index) { return DgradTable::at(index); }
  static int32_t tiles() { return DgradTable::kSize; }

  // Of one launch, of at most `images` images; rows is 0 where not even one fits.
  Product product(const RfConvConfiguration& tile, int64_t* images) const {
    const PhaseSize phase = phase_size(problem);
    const int64_t phases = problem.stride[0] * problem.stride[1];
    const int64_t pixels = phase.rows * phase.columns;
    Product product = common();
    product.columns = problem.weight_size[1];
    product.copies = problem.groups * phases;
    product.wide = dgrad_reads_wide(problem);
    const int64_t tiles_each = divide_up(product.columns, tile.n) * product.copies;
    const int64_t rows = std::min(kMost, kMost / tiles_each * tile.m);
    *images = std::min(*images, rows / pixels);
    product.rows = *images * pixels;
    product.depth = static_cast<double>(problem.weight_size[0] / problem.groups) *
                    static_cast<double>(problem.weight_size[2] * problem.weight_size[3]) /
                    static_cast<double>(phases);
    return product;
  }
  // Of the phase with most taps.
  int64_t steps(const Product& product, const RfConvConfiguration& tile) const {
    const auto taps = [&](int d) {
      const PhasedAxis axis = phased_axis(problem, d);
      return divide_up(axis.taps, axis.tap_step);
    };
    const int64_t depth = problem.weight_size[0] / problem.groups * taps(0) * taps(1);
    return divide_up(depth * product.bytes, tile.step_bytes);
  }
  double merging(const RfConvConfiguration& tile, const Product& product, int64_t splits) const {
    // Each block leaves its sums, and the last one of a tile reads them all.
    const double part = tile.m * tile.n * 4 / kCacheBytes;
    const double busy =
        static_cast<double>(divide_up(tiles_of(product, tile) * splits, gpu.multiprocessors));
    return kMeeting + (busy + static_cast<double>(splits)) * part;
  }
  int64_t workspace(int64_t tiles, int64_t splits, const RfConvConfiguration& tile) const {
    return arrival_bytes(tiles) + tiles * splits * tile.m * tile.n * 4;
  }
};

struct WgradChooser : Chooser {
  static constexpr int kMostSplits = kMostWgradSplits;

  static const RfConvConfiguration* tile(int32_t index) { return WgradTable::at(index); }
  static int32_t tiles() { return WgradTable::kSize; }

  // The sums run over all images, so a launch cannot leave any out.
  Product product(const RfConvConfiguration& tile, int64_t* images) const {
    const OutputSize size = output_size(problem);
    Product product = common();
    product.columns = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
    product.copies = problem.groups;
    product.wide = wgrad_reads_wide(problem);
    product.depth = static_cast<double>(*images * size.p * size.q);
    product.rows = problem.weight_size[0] / problem.groups;
    if (*images > kMost / (size.p * size.q) || tiles_of(product, tile) > kMost) *images = 0;
    return product;
  }
  int64_t steps(const Product& product, const RfConvConfiguration& tile) const {
    return divide_up(static_cast<int64_t>(product.depth) * product.bytes, tile.step_bytes);
  }
  double merging(const RfConvConfiguration& tile, const Product& product, int64_t splits) const {
    // The blocks leave their sums, and the second kernel's read them, on all multiprocessors.
    const double parts = static_cast<double>(tiles_of(product, tile) * splits);
    const double part = tile.m * tile.n * 4 / kCacheBytes;
    return kMeeting + 2 * parts / gpu.multiprocessors * part;
  }
  int64_t workspace(int64_t tiles, int64_t splits, const RfConvConfiguration& tile) const {
    return tiles * splits * tile.m * tile.n * 4;
  }
};

template <class Choice>
int32_t choose(const Choice& choice, int32_t configuration, int32_t splits, RfConvPlan* plan,
               const Refusal& refuse) {
  const RfConvGradient& problem = choice.problem;
  if (check_dtype(problem, refuse) != 0 || check_sizes(problem, refuse) != 0 ||
      check_products(problem, refuse) != 0) {
    return 1;
  }
  if (choice.gpu.multiprocessors < 1) {
    return refuse("a GPU of %d multiprocessors", choice.gpu.multiprocessors);
  }
  if (configuration < -1 || configuration >= choice.tiles()) {
    return refuse("configuration %d; there are 0 to %d", configuration, choice.tiles() - 1);
  }
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, 1, 0, 0};
  if (choice.empty()) {
    refuse("an empty problem: nothing is launched");
    return 0;
  }
  const char* against = nullptr;
  for (int i = 0; i < choice.tiles(); ++i) {
    const RfConvConfiguration& tile = *choice.tile(i);
    if (configuration >= 0 && i != configuration) continue;
    int64_t images = problem.x_size[0];
    const Product product = choice.product(tile, &images);
    const char* refusal = unfit(tile, product, choice.gpu);
    if (refusal != nullptr) against = refusal;
    // Narrow loads are for what is not wide, unless they are asked for.
    if (refusal != nullptr || (configuration < 0 && product.wide && tile.wide == 0)) continue;
    if (images < 1) {
      against = "more tiles or pixels than a launch can have";
      continue;
    }
    const int64_t steps = choice.steps(product, tile);
    const int64_t tiles = tiles_of(product, tile);
    for (int64_t parts = 1; parts <= std::max<int64_t>(Choice::kMostSplits, splits); ++parts) {
      if (splits > 0 && parts != splits) continue;
      if (!has_work(steps, parts) || tiles * parts > kMost) {
        if (splits > 0) against = "its reduction has no such parts with work for each";
        continue;
      }
      double cycles = cost(product, tile, parts, choice.gpu);
      if (parts > 1) cycles += choice.merging(tile, product, parts);
      if (plan->launches > 0 && cycles >= plan->cycles) continue;
      *plan = RfConvPlan{i,
                         static_cast<int32_t>(parts),
                         parts > 1 ? choice.workspace(tiles, parts, tile) : 0,
                         divide_up(problem.x_size[0], images),
                         images,
                         tiles * parts,
                         cycles};
    }
  }
  if (plan->launches == 0) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against);
    return refuse("configuration %d (%s), %d splits: %s", configuration,
                  choice.tile(configuration)->name, splits, against);
  }
  refuse("%s, %d splits: %s, %lld blocks on %d multiprocessors",
         choice.tile(plan->configuration)->name, plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), choice.gpu.multiprocessors);
  return 0;
}

}  // namespace
}  // namespace resnet_fused

extern "C" {

int32_t rf_conv_dgrad_configurations(void) { return resnet_fused::DgradTable::kSize; }
int32_t rf_conv_wgrad_configurations(void) { return resnet_fused::WgradTable::kSize; }

const RfConvConfiguration* rf_conv_dgrad_configuration(int32_t index) {
  return resnet_fused::DgradTable::at(index);
}
const RfConvConfiguration* rf_conv_wgrad_configuration(int32_t index) {
  return resnet_fused::WgradTable::at(index);
}

int32_t rf_conv_dgrad_plan(const RfConvGradient* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(DgradChooser{{*problem, *gpu}}, configuration, splits, plan, {why, why_bytes});
}
int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(WgradChooser{{*problem, *gpu}}, configuration, splits, plan, {why, why_bytes});
}

}  // extern "C"
