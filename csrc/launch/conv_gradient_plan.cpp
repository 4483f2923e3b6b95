// The tables of the gradients' configurations, and the pure functions that pick one and its splits.
#include <algorithm>

#include "conv_gradient_choice.h"
#include "conv_gradient_tiles.h"

namespace resnet_fused {
namespace {

// conv_wgrad: a result of one tile still fills the largest GPUs twice.
constexpr int kMostWgradSplits = 512;

using DgradTable = GradientTable<DgradWideTiles, DgradNarrowTiles>;
using WgradTable = GradientTable<WgradWideTiles, WgradNarrowTiles>;

struct WgradChooser : GradientChooser {
  static constexpr int kMostSplits = kMostWgradSplits;

  static const RfConvConfiguration* tile(int32_t index) { return WgradTable::at(index); }
  static int32_t tiles() { return WgradTable::kSize; }

  // The sums run over all images, so a launch cannot leave any out.
  GradientProduct product(const RfConvConfiguration& tile, int64_t* images) const {
    const OutputSize size = output_size(problem);
    GradientProduct product = common();
    product.columns = problem.weight_size[1] * problem.weight_size[2] * problem.weight_size[3];
    product.copies = problem.groups;
    product.wide = wgrad_reads_wide(problem);
    product.depth = static_cast<double>(*images * size.p * size.q);
    product.rows = problem.weight_size[0] / problem.groups;
    if (*images > kMost / (size.p * size.q) || tiles_of(product, tile) > kMost) *images = 0;
    return product;
  }
  int64_t steps(const GradientProduct& product, const RfConvConfiguration& tile) const {
    return divide_up(static_cast<int64_t>(product.depth) * product.bytes, tile.step_bytes);
  }
  double merging(const RfConvConfiguration& tile, const GradientProduct& product,
                 int64_t splits) const {
    // The blocks leave their sums, and the second kernel's read them, on all multiprocessors.
    const double parts = static_cast<double>(tiles_of(product, tile) * splits);
    const double part = tile.m * tile.n * 4 / kCacheBytes;
    return kMeeting + 2 * parts / gpu.multiprocessors * part;
  }
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t /*images*/) const {
    if (splits == 1) return 0;
    return tiles * splits * tile.m * tile.n * 4;
  }
};

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
  return choose(DgradChooser<DgradTable>{{*problem, *gpu, problem->y != nullptr}}, configuration,
                splits, plan, {why, why_bytes});
}
int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(WgradChooser{{*problem, *gpu, problem->y != nullptr}}, configuration, splits, plan,
                {why, why_bytes});
}

}  // extern "C"
