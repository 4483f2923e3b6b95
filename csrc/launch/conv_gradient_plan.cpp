// The table of conv_wgrad's configurations, and the pure function that picks one and its splits.
#include "conv_gradient_choice.h"
#include "conv_gradient_tiles.h"
#include "conv_wgrad_choice.h"

namespace resnet_fused {
namespace {

using WgradTable = GradientTable<WgradWideTiles, WgradNarrowTiles>;

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_wgrad_configurations(void) { return resnet_fused::WgradTable::kSize; }

extern "C" const RfConvConfiguration* rf_conv_wgrad_configuration(int32_t index) {
  return resnet_fused::WgradTable::at(index);
}

extern "C" int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(WgradChooser<WgradTable>{{*problem, *gpu, problem->y != nullptr}}, configuration,
                splits, plan, {why, why_bytes});
}
