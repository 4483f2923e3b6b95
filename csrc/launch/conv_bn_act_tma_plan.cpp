// The configurations of conv_bn_act for sm_90a, and how long they are predicted to take. None of
// the rates has been measured by this project on a GPU; only their proportions matter.
#include <algorithm>

#include "conv_bn_act_tma.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr double kDrain = 60;  // cycles until the last product's sums are there

}  // namespace

TmaTileFacts tma_tile(int index) {
  return ConvTmaTiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string tma_name(const TmaTileFacts& tile) {
  return std::string("tma_") + (tile.pixels_left ? "p" : "s") + std::to_string(tile.pixels) + "x" +
         std::to_string(tile.channels) + "_" + std::to_string(tile.stages) + "s" +
         (tile.together ? "" : "_t") +
         (tile.filter_sharing() > 1 ? "_" + std::to_string(tile.filter_sharing()) + "c" : "") +
         (tile.pixel_sharing > 1 ? "_" + std::to_string(tile.pixel_sharing) + "p" : "");
}

int64_t tma_tiles(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels) {
  const int64_t channels = problem.weight_size[0] / problem.groups;
  return divide_up(pixels, tile.pixels * tile.filter_sharing()) *
         divide_up(channels, tile.channels * tile.pixel_sharing) * problem.groups;
}

int64_t tma_blocks(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t pixels,
                   const RfGpu& gpu) {
  const int64_t clusters =
      std::max<int64_t>(1, cluster_multiprocessors(tile.sharing, gpu) / tile.sharing);
  return tile.sharing * std::min(tma_tiles(problem, tile, pixels), clusters);
}

RfConvConfiguration tma_configuration(const TmaTileFacts& tile) {
  // A step's 128 bytes of a row; two warpgroups multiply.
  return {nullptr,
          1,
          tile.pixels,
          tile.channels,
          tile.pixels_left ? 8 : 1,
          tile.pixels_left ? 1 : 8,
          tile.stages,
          1,
          kStepRowBytes,
          tile.shared_bytes,
          0,
          1};
}

// The busiest block's tiles. L2 is asked once for what blocks share. Loads, which never
// stop, run beside the products and the stores of other tiles; products of warpgroups that work
// together wait for their epilogue, those in turns do not.
double tma_cost(const RfConvBnAct& problem, const TmaTypes& types, const TmaTileFacts& tile,
                int64_t pixels, const RfGpu& gpu, const StepTransform& transform) {
  const int64_t clusters = tma_blocks(problem, tile, pixels, gpu) / tile.sharing;
  const auto each = static_cast<double>(divide_up(tma_tiles(problem, tile, pixels), clusters));
  const int64_t step = kStepRowBytes / element_bytes(types.operands);
  const auto steps = static_cast<double>(divide_up(problem.weight_size[1], step) *
                                         problem.weight_size[2] * problem.weight_size[3]);
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double both = static_cast<double>(tile.pixels) + tile.channels;
  const double columns = tile.pixels_left ? tile.channels : tile.pixels;
  const double rows = area / columns;
  const double written = both * kStepRowBytes;
  // Each warpgroup reads its own rows and all of the columns.
  const double read = rows * kStepRowBytes + rows / kWarpgroupRows * columns * kStepRowBytes;
  // The same bytes take the same time in every type. Sums of a step's own are added up by threads:
  // behind the products where no other warpgroup multiplies.
  const double matrix = area * kStepElements / kWarpgroupUnit;
  const bool exposed = types.operands == TensorElement::kUint8 && !tile.together;
  const double adds = exposed ? area / kInstructions + kDrain : 0;
  const double lines = (read + written + transform.bytes) / kSharedBytes;
  const double multiply = steps * (std::max({matrix, lines, transform.cycles}) + adds);
  const double asked = tile.pixels_asked() + tile.filters_asked();
  const double load = steps * asked * kStepRowBytes / kCacheBytes;
  const auto moved = static_cast<double>(
      element_bytes(types.out) + (problem.residual != nullptr ? element_bytes(types.residual) : 0));
  const double ends = area * moved / kMemoryBytes;
  // Words of float32 go to the staging one by one, shortcuts come from there.
  const double words = types.out == TensorElement::kFloat32 ? area * moved / kSharedBytes : 0;
  const double results = std::max(area / kResults, words);
  const double busy = tile.together ? multiply + results : std::max(multiply, results);
  const double meetings = tile.sharing > 1 ? 2 * kClusterMeeting : 0;
  return each * std::max({busy, load, ends}) + results + meetings + 2 * kLatency;
}

}  // namespace resnet_fused
