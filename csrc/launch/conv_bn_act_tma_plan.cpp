// The configurations of conv_bn_act for sm_90a, and how long they are predicted to take. None of
// the rates has been measured by this project on a GPU; only their proportions matter.
#include <algorithm>

#include "conv_bn_act_tma.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr double kWarpgroupUnit = 2048 * 0.85;  // products a cycle of a multiprocessor, by wgmma
constexpr double kResults = 36;                 // that the epilogue makes in a cycle
constexpr double kSharedLines = 128;            // bytes a cycle, for products, TMA and epilogue

}  // namespace

TmaTileFacts tma_tile(int index) {
  return ConvTmaTiles::with(index, []<class Shape>() {
    return TmaTileFacts{Shape::kPixelsLeft, Shape::kTogether, Shape::kPixels,
                        Shape::kChannels,   Shape::kStages,   Shape::kStoredPixels,
                        Shape::kSharedBytes};
  });
}

std::string tma_name(const TmaTileFacts& tile) {
  return std::string("tma_") + (tile.pixels_left ? "p" : "s") + std::to_string(tile.pixels) + "x" +
         std::to_string(tile.channels) + "_" + std::to_string(tile.stages) + "s" +
         (tile.together ? "" : "_t");
}

// The busiest block's tiles. Loads, which never stop, run beside the products and the stores of
// other tiles; products of warpgroups that work together wait for their epilogue, those in turns do
// not.
double tma_cost(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                const RfGpu& gpu) {
  const int64_t channels = problem.weight_size[0] / problem.groups;
  const int64_t tiles =
      divide_up(pixels, tile.pixels) * divide_up(channels, tile.channels) * problem.groups;
  const auto each = static_cast<double>(divide_up(tiles, gpu.multiprocessors));
  const auto steps = static_cast<double>(divide_up(problem.weight_size[1], kStepElements) *
                                         problem.weight_size[2] * problem.weight_size[3]);
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double both = static_cast<double>(tile.pixels) + tile.channels;
  const double columns = tile.pixels_left ? tile.channels : tile.pixels;
  const double rows = area / columns;
  const double written = both * kStepRowBytes;
  // Each warpgroup reads its own rows and all of the columns.
  const double read = rows * kStepRowBytes + rows / kWarpgroupRows * columns * kStepRowBytes;
  const double matrix = area * kStepElements / kWarpgroupUnit;
  const double multiply = steps * std::max(matrix, (read + written) / kSharedLines);
  const double load = steps * written / kCacheBytes;
  const double ends = area * 2 * (problem.residual != nullptr ? 2 : 1) / kMemoryBytes;
  const double results = area / kResults;
  const double busy = tile.together ? multiply + results : std::max(multiply, results);
  return each * std::max({busy, load, ends}) + results + 2 * kLatency;
}

}  // namespace resnet_fused
