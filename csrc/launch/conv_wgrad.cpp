// conv_wgrad's configurations, the pure function that picks one and its splits, and the launch.
#include "conv_gradient_choice.h"
#include "conv_gradient_tiles.h"
#include "conv_wgrad_choice.h"

namespace resnet_fused {
namespace {

using WgradTable = GradientTable<WgradWideTiles, WgradNarrowTiles>;
using ConvWgradChooser = WgradChooser<WgradTable>;

int run_by_tma(const RfConvGradient& problem, const RfConvPlan& plan,
               const RfConvConfiguration& tile, void* workspace, void* stream) {
  ConvWgradTmaArguments arguments{};
  const int error =
      wgrad_tma_arguments(problem, problem.y != nullptr, plan, tile, workspace, &arguments);
  if (error != 0) return error;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_wgrad_tma_float16 : launch_conv_wgrad_tma_bfloat16;
  return launch(arguments, plan.configuration - WgradTable::kSize, stream);
#else
  return static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_wgrad_configurations(void) {
  return resnet_fused::ConvWgradChooser::tiles();
}

extern "C" const RfConvConfiguration* rf_conv_wgrad_configuration(int32_t index) {
  return resnet_fused::ConvWgradChooser::tile(index);
}

extern "C" int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(ConvWgradChooser{{*problem, *gpu, problem->y != nullptr}}, configuration, splits,
                plan, {why, why_bytes});
}

extern "C" int rf_conv_wgrad_cuda(const RfConvGradient* problem, const RfConvPlan* plan,
                                  void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const RfConvConfiguration& tile = *rf_conv_wgrad_configuration(plan->configuration);
  if (tile.tma != 0) return run_by_tma(*problem, *plan, tile, workspace, stream);
  const auto arguments = conv_wgrad_arguments(*problem, *plan, tile, workspace);
  constexpr Launches<ConvWgradArguments> kLaunches{
      launch_conv_wgrad_bfloat16, launch_conv_wgrad_float16, launch_conv_wgrad_float32};
  return kLaunches(problem->dtype, arguments, plan->configuration, stream);
}
