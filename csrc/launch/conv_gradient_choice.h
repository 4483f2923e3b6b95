// How a gradient's configuration and its splits are picked: what the plans of conv_dgrad,
// conv_wgrad, conv_bn_dgrad, conv_bn_wgrad and conv_bn_grad1x1 share. Inside of this room.
//
// The choice is the least predicted time, as for conv_bn_act.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "../device/halo_wgrad_shape.h"
#include "conv_gradient_arguments.h"
#include "conv_halo.h"
#include "conv_plan.h"
#include "conv_tiles.h"

namespace resnet_fused {

// Instructions to widen, scale, mask and round an element of dy.
constexpr double kMaskInstructions = 6;
// Instructions of BatchNorm's backward on an element of dz and y: to widen, multiply, add, pack and
// place it; and of the BatchNorm and ReLU below on an element of x.
constexpr double kBackwardInstructions = 5;
constexpr double kNormInstructions = 3.5;
// Instructions that an element of a gradient between two BatchNorms takes at its tile's end: to be
// stored and loaded once more, added to, rounded; with a ReLU below to be masked and summed.
constexpr double kEndInstructions = 3;
constexpr double kReduceInstructions = 7;
// conv_dgrad: beyond, the parts of these networks' reductions are a step or two long.
constexpr int kMostDgradSplits = 32;

// The configurations of an op. kStaged: a block puts its result together in the ring, where one in
// float32 has to fit; such are served by those of at most kFloatColumns columns.
// ImageTiles: those of an image of a few channels, of 16 bits, by its rows.
template <class WideTiles, class NarrowTiles, bool kStaged = true, int kFloatColumns = 256,
          class ImageTiles = TileList<>>
struct GradientTable {
  static constexpr int kOperandTiles = WideTiles::kSize + NarrowTiles::kSize;
  static constexpr int kSize = kOperandTiles + ImageTiles::kSize;

  static const RfConvConfiguration* at(int32_t index) {
    if (index < 0 || index >= kSize) return nullptr;
    static const GradientTable table;
    return &table.entries_[index];
  }

 private:
  GradientTable() {
    for (int i = 0; i < kSize; ++i) {
      const bool image = i >= kOperandTiles;
      const bool wide = image || i < WideTiles::kSize;
      const auto fill = [&]<class Shape>() {
        const char* kind = kWindowsOf<Shape> > 0 ? "halo_"
                           : image               ? "image_"
                           : wide                ? ""
                                                 : "narrow_";
        names_[i] = std::string(kind) + std::to_string(Shape::kM) + "x" +
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
                       !image && (!kStaged || kWindowsOf<Shape> > 0 || kOutputFits<float, Shape>) &&
                           Shape::kN <= kFloatColumns,
                       0,
                       kWindowsOf<Shape>};
        entries_[i].image = image;
      };
      if (image) {
        if constexpr (ImageTiles::kSize > 0) ImageTiles::with(i - kOperandTiles, fill);
      } else if (wide) {
        WideTiles::with(i, fill);
      } else {
        NarrowTiles::with(i - WideTiles::kSize, fill);
      }
    }
  }

  std::array<std::string, kSize> names_;
  std::array<RfConvConfiguration, kSize> entries_;
};

// The matrix product that a gradient is.
struct GradientProduct {
  int64_t rows;  // of one launch and one phase
  int64_t columns;
  int64_t copies;  // groups, times phases
  double depth;    // of the reduction; the phases' mean
  int64_t bytes;   // of an element
  bool wide;
  int32_t operands;      // that make the left side: dy, or dy and y
  double turning;        // instructions to turn an element of it where it has landed; 0: none is
  double turning_right;  // likewise of the right side, which is one operand
  double ends;       // elements that a tile reads and writes at its end, for each of the result's
  double finishing;  // instructions that each of these takes beside its rounding
  bool windows;      // the taps of its pixels are one run of pixels
  int64_t width;     // of a row of pixels
  bool over_pixels;  // they are the reduction: a window goes along it
};

inline int64_t tiles_of(const GradientProduct& product, const RfConvConfiguration& tile) {
  return divide_up(product.rows, tile.m) * divide_up(product.columns, tile.n) * product.copies;
}

// Of a block: with its windows.
inline int64_t shared_bytes(const GradientProduct& product, const RfConvConfiguration& tile) {
  if (tile.window == 0) return tile.shared_bytes;
  if (product.over_pixels) return tile.shared_bytes + halo_ring_bytes(tile.stages, product.width);
  return halo_staged_bytes(tile.shared_bytes, tile.m, tile.n, product.width, tile.window);
}

// What a step of a block brings of an operand, in bytes, and how many steps bring its pixels once:
// a window is there for all of its taps.
struct StepOperands {
  double left;
  double right;
  int taps;
};
inline StepOperands step_operands(const GradientProduct& product, const RfConvConfiguration& tile) {
  const auto bytes = [&](int64_t rows) { return static_cast<double>(rows * tile.step_bytes); };
  if (tile.window == 0) return {bytes(tile.m), bytes(tile.n), 1};
  if (product.over_pixels) return {bytes(tile.m), bytes(tile.n) / kHaloTaps, 1};
  return {bytes(halo_rows(tile.m, product.width)) / kHaloTaps, bytes(tile.n), kHaloTaps};
}

// Cycles of one launch, predicted: the blocks of the busiest multiprocessor, each step of each at
// its limit. See conv_bn_act_plan.cpp; here dy is read, turned and written back in shared memory,
// and y comes beside it; in windows for all taps of a slice of channels.
inline double cost(const GradientProduct& product, const RfConvConfiguration& tile, int64_t splits,
                   const RfGpu& gpu) {
  const double busy =
      static_cast<double>(divide_up(tiles_of(product, tile) * splits, gpu.multiprocessors));
  const double bytes = static_cast<double>(product.bytes);
  const auto [left, right, taps] = step_operands(product, tile);
  const double depth = product.depth / taps * bytes / tile.step_bytes;
  const auto parts = static_cast<double>(splits);
  const double steps = taps > 1 ? taps * std::ceil(depth / parts) : std::max(1.0, depth) / parts;
  const double resident = resident_blocks(tile, shared_bytes(product, tile), busy, gpu);
  const double area = static_cast<double>(tile.m) * tile.n;
  StepWork work{left * product.operands + right};
  work.turned = (product.turning > 0 ? left * (product.operands + 1) : 0) +
                (product.turning_right > 0 ? right * 2 : 0);
  work.turning = (left * product.turning + right * product.turning_right) / bytes / kInstructions;
  // While a block turns what has landed, only its neighbours multiply.
  const double pause = work.turning > 0 ? (work.turning + kTurnLatency / taps) / resident : 0;
  const double step = step_cycles(tile, work, product.bytes, resident) + pause;
  const double ends = area * bytes * product.ends / kMemoryBytes;
  return blocks_cycles(busy, resident, steps * step + area * product.finishing / kInstructions,
                       ends);
}

// Cycles in which all multiprocessors leave the sums of a tile's parts, and a second kernel reads
// them.
inline double left_and_merged(const RfConvConfiguration& tile, double parts, const RfGpu& gpu) {
  const double part = tile.m * tile.n * 4 / kCacheBytes;
  return kMeeting + 2 * parts / gpu.multiprocessors * part;
}

inline int32_t check_products(const RfConvGradient& problem, const Refusal& refuse) {
  const int64_t columns = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
  const int64_t taps = problem.weight_size[0] * problem.weight_size[2] * problem.weight_size[3];
  if (columns > kMost || taps > kMost) {
    return refuse("filters of %lld elements, %lld taps of all filters; up to %lld are possible",
                  static_cast<Long>(columns), static_cast<Long>(taps), static_cast<Long>(kMost));
  }
  return 0;
}

// What keeps a configuration from a product; null if nothing.
inline const char* unfit(const RfConvConfiguration& tile, const GradientProduct& product,
                         const RfGpu& gpu) {
  if (tile.window != 0 && !product.windows) return kNoWindows;
  if (shared_bytes(product, tile) > gpu.shared_per_block) {
    return "too much shared memory for this GPU";
  }
  if (product.bytes == 4 && tile.float32 == 0) return "it does not serve float32";
  if (tile.wide != 0 && !product.wide) return "its operands cannot be read 16 bytes at a time";
  return nullptr;
}

// A gradient's part of the choice. For a tile: the product of one launch, and its images; or null
// and why not.
struct GradientChooser {
  static constexpr bool kSplitsByTma = false;  // whether configurations by TMA may be split

  const RfConvGradient& problem;
  const RfGpu& gpu;
  bool reads_y;

  bool empty() const {
    const OutputSize size = output_size(problem);
    return problem.x_size[0] * problem.x_size[1] * problem.x_size[2] * problem.x_size[3] == 0 ||
           problem.weight_size[0] * problem.weight_size[2] * problem.weight_size[3] *
                   problem.weight_size[1] * size.p * size.q ==
               0;
  }
  GradientProduct common() const {
    GradientProduct product{};
    product.bytes = bytes_of(problem.dtype);
    product.operands = reads_y ? 2 : 1;
    product.turning = kMaskInstructions;
    product.ends = 1;
    product.windows = taps_are_one_run(problem);
    product.width = problem.x_size[3];
    return product;
  }

  // Whether the sums of so many parts meet in memory.
  bool merges(const RfConvConfiguration& /*tile*/, int64_t splits) const { return splits > 1; }
  // Of a configuration, by a product of one launch of so many images. What a table's kernels by
  // other means are to an op stands in the place of these.
  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t /*of*/,
                    int64_t /*images*/) const {
    const char* found = resnet_fused::unfit(tile, product, gpu);
    return found != nullptr ? found : "";
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t /*of*/, int64_t /*images*/) const {
    return cost(product, tile, splits, gpu);
  }
  int64_t blocks(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                 int32_t /*of*/, int64_t /*images*/) const {
    return tiles_of(product, tile) * splits;
  }
};

// Of gradients of an input, by phases of the stride.
template <class Table>
struct DgradChooser : GradientChooser {
  static constexpr int kMostSplits = kMostDgradSplits;

  static const RfConvConfiguration* tile(int32_t index) { return Table::at(index); }
  static int32_t tiles() { return Table::kSize; }

  // Of one launch, of at most `images` images; rows is 0 where not even one fits.
  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const PhaseSize phase = phase_size(problem);
    const int64_t phases = problem.stride[0] * problem.stride[1];
    const int64_t pixels = phase.rows * phase.columns;
    GradientProduct product = common();
    product.columns = problem.weight_size[1];
    product.copies = problem.groups * phases;
    product.wide = dgrad_reads_wide(problem, reads_y);
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
  int64_t steps(const GradientProduct& product, const RfConvConfiguration& tile) const {
    const auto taps = [&](int d) {
      const PhasedAxis axis = phased_axis(problem, d);
      return divide_up(axis.taps, axis.tap_step);
    };
    const int64_t channels = problem.weight_size[0] / problem.groups;
    const int64_t depth = tile.window != 0 ? channels : channels * taps(0) * taps(1);
    return divide_up(depth * product.bytes, tile.step_bytes);
  }
  double merging(const RfConvConfiguration& tile, const GradientProduct& product,
                 int64_t splits) const {
    // Each block leaves its sums, and the last one of a tile reads them all.
    const double part = tile.m * tile.n * 4 / kCacheBytes;
    const double busy =
        static_cast<double>(divide_up(tiles_of(product, tile) * splits, gpu.multiprocessors));
    return kMeeting + (busy + static_cast<double>(splits)) * part;
  }
  // Bytes that a plan takes whose launches have so many tiles and images.
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t /*images*/) const {
    return splits > 1 ? arrival_bytes(tiles) + tiles * splits * tile.m * tile.n * 4 : 0;
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
  std::string against, against_tma, against_windows, against_both;
  bool in_both = !taps_are_one_run(problem);
  bool in_windows = !taps_are_one_run(problem);  // or nothing is missed
  bool in_some_tma = false;
  for (int i = 0; i < choice.tiles(); ++i) {
    const RfConvConfiguration& tile = *choice.tile(i);
    if (configuration >= 0 && i != configuration) continue;
    int64_t images = problem.x_size[0];
    const GradientProduct product = choice.product(tile, &images);
    const std::string refusal = choice.unfit(tile, product, i, std::max<int64_t>(images, 1));
    std::string& said = configuration >= 0 ? against
                        : tile.tma == 0    ? (tile.window != 0 ? against_windows : against)
                        : tile.window != 0 ? against_both
                                           : against_tma;
    if (!refusal.empty()) said = refusal;
    if (tile.window != 0 && refusal.empty()) (tile.tma != 0 ? in_both : in_windows) = true;
    if (tile.tma != 0 && tile.window == 0 && refusal.empty()) in_some_tma = true;
    // Narrow loads are for what is not wide, unless they are asked for.
    if (!refusal.empty() || (configuration < 0 && product.wide && tile.wide == 0)) continue;
    if (images < 1) {
      against = "more tiles or pixels than a launch can have";
      continue;
    }
    const int64_t steps = choice.steps(product, tile);
    const int64_t tiles = tiles_of(product, tile);
    for (int64_t parts = 1; parts <= std::max<int64_t>(Choice::kMostSplits, splits); ++parts) {
      if (splits > 0 && parts != splits) continue;
      if (tile.tma != 0 && parts > 1 && !Choice::kSplitsByTma) {
        if (splits > 0) said = "splits: only 1 is served by TMA";
        continue;
      }
      if (!has_work(steps, parts) || tiles * parts > kMost) {
        if (splits > 0) against = "its reduction has no such parts with work for each";
        continue;
      }
      double cycles = choice.cycles(tile, product, parts, i, images);
      if (choice.merges(tile, parts)) cycles += choice.merging(tile, product, parts);
      if (plan->launches > 0 && cycles >= plan->cycles) continue;
      *plan = RfConvPlan{i,
                         static_cast<int32_t>(parts),
                         choice.workspace(tile, tiles, parts, images),
                         divide_up(problem.x_size[0], images),
                         images,
                         choice.blocks(tile, product, parts, i, images),
                         cycles};
    }
  }
  if (plan->launches == 0) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s), %d splits: %s", configuration,
                  choice.tile(configuration)->name, splits, against.c_str());
  }
  std::string missed;
  if (!in_windows && !against_windows.empty()) missed += "; no windows: " + against_windows;
  // Of a GPU that has no TMA nothing is said.
  if (choice.gpu.capability == 90) {
    const bool by_tma = choice.tile(plan->configuration)->tma != 0;
    if (!by_tma && !in_some_tma && !against_tma.empty()) missed += "; no TMA: " + against_tma;
    if (!in_both && !against_both.empty()) missed += "; no windows by TMA: " + against_both;
  }
  refuse("%s, %d splits: %s, %lld blocks on %d multiprocessors%s",
         choice.tile(plan->configuration)->name, plan->splits,
         configuration < 0 ? "least predicted time" : "as asked for",
         static_cast<Long>(plan->blocks), choice.gpu.multiprocessors, missed.c_str());
  return 0;
}

}  // namespace resnet_fused
