// conv_dgrad's configurations, the pure function that picks one and its splits, and the launch of
// each part of the batch.
#include <algorithm>

#include "conv_dgrad_tma.h"
#include "conv_dgrad_tma_tiles.h"
#include "conv_gradient_choice.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

using DgradTable = GradientTable<DgradWideTiles, DgradNarrowTiles>;

constexpr DgradNames kNames{"dy", "scale"};
// Instructions that two elements of dy take until they are an operand: to be loaded with y's,
// widened, scaled, compared and packed.
constexpr double kTurnInstructions = 14;
constexpr double kScaleLoads = 8;  // of a warp and step, in pairs

const std::vector<DgradTmaEntry>& tma_table() { return dgrad_tma_table<DgradTmaTiles>(); }
TmaTileFacts tma_tile_at(int32_t index) {
  return dgrad_tma_tile<DgradTmaTiles>(index - kFirstDgradTma);
}

// By mma.sync, and behind those by wgmma.
struct ConvDgradChooser : DgradChooser<DgradTable> {
  static const RfConvConfiguration* tile(int32_t index) {
    return rf_conv_dgrad_configuration(index);
  }
  static int32_t tiles() { return rf_conv_dgrad_configurations(); }

  std::string unfit(const RfConvConfiguration& tile, const GradientProduct& product, int32_t index,
                    int64_t images) const {
    if (tile.tma == 0) return DgradChooser::unfit(tile, product, index, images);
    if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
    if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
    return dgrad_tma_fault(problem, tma_tile_at(index), kNames, reads_y, images);
  }
  double cycles(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::cycles(tile, product, splits, index, images);
    return dgrad_tma_cost(problem, tma_tile_at(index),
                          {reads_y, kTurnInstructions, 0, 1, kScaleLoads}, images, gpu);
  }
  int64_t blocks(const RfConvConfiguration& tile, const GradientProduct& product, int64_t splits,
                 int32_t index, int64_t images) const {
    if (tile.tma == 0) return DgradChooser::blocks(tile, product, splits, index, images);
    return dgrad_tma_blocks(problem, tma_tile_at(index), images, gpu);
  }
};

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_dgrad_configurations(void) {
  return resnet_fused::kFirstDgradTma + resnet_fused::DgradTmaTiles::kSize;
}

extern "C" const RfConvConfiguration* rf_conv_dgrad_configuration(int32_t index) {
  using namespace resnet_fused;
  return index < kFirstDgradTma ? DgradTable::at(index)
                                : configuration_at<tma_table>(index - kFirstDgradTma);
}

extern "C" int32_t rf_conv_dgrad_plan(const RfConvGradient* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes) {
  using namespace resnet_fused;
  return choose(ConvDgradChooser{{{*problem, *gpu, problem->y != nullptr}}}, configuration, splits,
                plan, {why, why_bytes});
}

extern "C" int rf_conv_dgrad_cuda(const RfConvGradient* problem, const RfConvPlan* plan,
                                  void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  const int64_t images = problem->x_size[0];
  const RfConvConfiguration& tile = *rf_conv_dgrad_configuration(plan->configuration);
  constexpr Launches<ConvDgradArguments> kLaunches{
      launch_conv_dgrad_bfloat16, launch_conv_dgrad_float16, launch_conv_dgrad_float32};
  for (int64_t first = 0; first < images; first += plan->images_a_launch) {
    const int64_t part = std::min(plan->images_a_launch, images - first);
    if (tile.tma != 0) {
      const int error = run_conv_dgrad_tma(*problem, *plan, first, part, stream);
      if (error != 0) return error;
      continue;
    }
    const auto arguments = conv_dgrad_arguments(*problem, *plan, tile, workspace, first, part);
    const int error = kLaunches(problem->dtype, arguments, plan->configuration, stream);
    if (error != 0) return error;
  }
  return 0;
}
