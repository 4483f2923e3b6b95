// The table of conv_bn_dgrad's configurations, and the pure function that picks one and its splits.
#include <algorithm>

#include "conv_bn_dgrad_choice.h"
#include "conv_bn_dgrad_stream_tiles.h"
#include "conv_bn_dgrad_tma.h"
#include "conv_bn_dgrad_tma_tiles.h"
#include "conv_bn_dgrad_window.h"
#include "tma_request.h"
#include "window_request.h"

namespace resnet_fused {
namespace {

using BnDgradTable =
    GradientTable<BnDgradWideTiles, BnDgradNarrowTiles, true, kBnDgradFloatColumns>;

// By wgmma in a window, of two elements of dz: what turns them, with the bits that say what lies
// beside an image.
constexpr double kWindowPairInstructions = 15;

const std::vector<DgradTmaEntry>& tma_table() { return dgrad_tma_table<BnDgradTmaTiles>(); }
TmaTileFacts tma_tile_at(int32_t index) {
  return dgrad_tma_tile<BnDgradTmaTiles>(index - kFirstBnDgradTma);
}

bool by_windows(const RfConvConfiguration& tile) { return tile.tma != 0 && tile.window != 0; }

// By mma.sync, behind those by wgmma, and behind those by wgmma in windows.
struct BnDgradChooser : BnDgradProducts<BnDgradTable> {
  static const RfConvConfiguration* tile(int32_t index) {
    return rf_conv_bn_dgrad_configuration(index);
  }
  static int32_t tiles() { return rf_conv_bn_dgrad_configurations(); }

  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (tile.tma == 0) return DgradChooser::unfit(tile, product, index, images);
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    if (by_windows(tile)) return bn_dgrad_window_fault(whole, index - kFirstBnDgradWindow, images);
    return bn_dgrad_tma_fault(whole, tma_tile_at(index), images);
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::cycles(tile, product, splits, index, images);
    const double turning = by_windows(tile) ? kWindowPairInstructions : kTurnPairInstructions;
    const double loads = by_windows(tile) || !reads_y ? 0 : kCoefficientLoads;
    const DgradWork work{reads_y, reads_y ? turning : 0, product.finishing, product.ends, loads};
    if (by_windows(tile)) {
      return bn_dgrad_window_cost(whole, index - kFirstBnDgradWindow, work, images, gpu);
    }
    return dgrad_tma_cost(problem, tma_tile_at(index), work, images, gpu);
  }
  int64_t blocks(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                 int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::blocks(tile, product, splits, index, images);
    if (by_windows(tile)) {
      return bn_dgrad_window_blocks(whole, index - kFirstBnDgradWindow, images, gpu);
    }
    return dgrad_tma_blocks(problem, tma_tile_at(index), images, gpu);
  }

  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const int64_t (&size)[4] = problem.x_size;
    if (by_windows(tile)) {  // a launch counts positions, too
      *images = std::min(*images, kMost / ((size[2] + 1) * (size[3] + 1)));
    }
    GradientProduct product = BnDgradProducts::product(tile, images);
    if (by_windows(tile)) product.rows = walk_positions(*images, size[2], size[3]);
    return product;
  }
  int64_t workspace(const RfConvConfiguration& tile, int64_t /*tiles*/, int64_t splits,
                    int64_t images) const {
    return bn_dgrad_layout(whole, tile, static_cast<int32_t>(splits), images).bytes;
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_bn_dgrad_configurations(void) {
  return resnet_fused::kFirstBnDgradStream + resnet_fused::BnDgradStreamTiles::kSize;
}

extern "C" const RfConvConfiguration* rf_conv_bn_dgrad_configuration(int32_t index) {
  using namespace resnet_fused;
  if (index < kFirstBnDgradTma) return BnDgradTable::at(index);
  if (index < kFirstBnDgradWindow) return configuration_at<tma_table>(index - kFirstBnDgradTma);
  return configuration_at<bn_dgrad_window_table>(index - kFirstBnDgradWindow);
}

extern "C" int32_t rf_conv_bn_dgrad_plan(const RfConvBnDgrad* problem, const RfGpu* gpu,
                                         int32_t configuration, int32_t splits, RfConvPlan* plan,
                                         char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  if (check_addend(*problem, refuse) != 0) return 1;
  const BnDgradChooser chooser{{{{problem->conv, *gpu, problem->affine != 0}}, *problem}};
  return choose(chooser, configuration, splits, plan, refuse);
}
