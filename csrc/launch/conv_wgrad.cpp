// conv_wgrad's configurations, the pure function that picks one and its splits, and the launch.
#include "conv_gradient_choice.h"
#include "conv_gradient_tiles.h"
#include "conv_wgrad_choice.h"
#include "conv_wgrad_tma.h"
#include "conv_wgrad_tma_tiles.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

using WgradTable = GradientTable<WgradWideTiles, WgradNarrowTiles>;

// By mma.sync, and behind those by wgmma.
struct ConvWgradChooser : WgradChooser<WgradTable> {
  static constexpr bool kSplitsByTma = true;

  static const RfConvConfiguration* tile(int32_t index) {
    return rf_conv_wgrad_configuration(index);
  }
  static int32_t tiles() { return rf_conv_wgrad_configurations(); }

  // By wgmma every block leaves its sums.
  bool merges(const RfConvConfiguration& tile, int64_t splits) const {
    return tile.tma != 0 || splits > 1;
  }
  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (tile.tma == 0) return WgradChooser::unfit(tile, product, index, images);
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    return wgrad_tma_fault(problem);
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t index, int64_t images) const {
    if (tile.tma == 0) return WgradChooser::cycles(tile, product, splits, index, images);
    return wgrad_tma_cost(product, tile, splits, gpu);
  }
  int64_t workspace(const RfConvConfiguration& tile, int64_t tiles, int64_t splits,
                    int64_t images) const {
    return merges(tile, splits) ? WgradChooser::workspace(tile, tiles, splits, images) : 0;
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_wgrad_configurations(void) {
  return resnet_fused::WgradTable::kSize + resnet_fused::wgrad_tma_configurations();
}

extern "C" const RfConvConfiguration* rf_conv_wgrad_configuration(int32_t index) {
  using namespace resnet_fused;
  return index < WgradTable::kSize ? WgradTable::at(index)
                                   : wgrad_tma_configuration(index - WgradTable::kSize);
}

extern "C" int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(ConvWgradChooser{{{*problem, *gpu, problem->y != nullptr}}}, configuration, splits,
                plan, {why, why_bytes});
}

extern "C" int rf_conv_wgrad_cuda(const RfConvGradient* problem, const RfConvPlan* plan,
                                  void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const RfConvConfiguration& tile = *rf_conv_wgrad_configuration(plan->configuration);
  if (tile.tma != 0) return run_conv_wgrad_tma(*problem, *plan, tile, workspace, stream);
  const auto arguments = conv_wgrad_arguments(*problem, *plan, tile, workspace);
  constexpr Launches<ConvWgradArguments> kLaunches{
      launch_conv_wgrad_bfloat16, launch_conv_wgrad_float16, launch_conv_wgrad_float32};
  return kLaunches(problem->dtype, arguments, plan->configuration, stream);
}
