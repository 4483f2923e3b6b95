// A weight's gradient for sm_90a: what the plans, the arguments and the launches of conv_wgrad and
// conv_bn_wgrad share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/wgrad_tma.h"
#include "conv_gradient_choice.h"
#include "step_transform.h"

namespace resnet_fused {

// Of a table of configurations, which point to names in it.
struct WgradEntry {
  std::string name;
  RfConvConfiguration configuration;
};
template <class Shape>
WgradEntry wgrad_entry(const char* kind, int32_t shared_bytes) {
  return {kind + std::to_string(Shape::kM) + "x" + std::to_string(Shape::kN) + "_" +
              std::to_string(Shape::kStages) + "s",
          {nullptr, 1, Shape::kM, Shape::kN, Shape::kWarpsM, Shape::kN / Shape::kWarpN,
           Shape::kStages, 1, Shape::kStepBytes, shared_bytes, 0, 1}};
}

// Blocks of a cluster that share dy and y, and those that share x.
struct WgradSharing {
  int32_t left = 1;
  int32_t right = 1;

  int32_t blocks() const { return left * right; }
};

int32_t wgrad_tma_configurations();
// Null for an index that there is not; index: in WgradTmaTiles.
const RfConvConfiguration* wgrad_tma_configuration(int32_t index);
WgradSharing wgrad_tma_sharing(int32_t index);
// The blocks of a launch, whole clusters.
int64_t wgrad_tma_blocks(const GradientProduct& product, const RfConvConfiguration& tile,
                         const WgradSharing& sharing, int64_t splits);

// What keeps a problem from it, with the argument's name; empty if nothing does. reads_y: y is an
// operand. gradient: dy's name.
std::string wgrad_tma_fault(const RfConvGradient& problem, bool reads_y, const char* gradient);

// cudaErrorNoKernelImageForDevice, for a build without sm_90a, whose plans choose none of it.
constexpr int kNoKernelImage = 209;

// Predicted cycles of so many splits, without what their sums take in memory. transform: of a
// step's columns.
double wgrad_tma_cost(const GradientProduct& product, const RfConvConfiguration& tile,
                      const WgradSharing& sharing, int64_t splits, const RfGpu& gpu,
                      const StepTransform& transform = {});

// The arguments of what wgrad_tma_fault finds nothing of; 0 or a cudaError_t.
int wgrad_tma_arguments(const RfConvGradient& problem, bool reads_y, const RfConvPlan& plan,
                        const RfConvConfiguration& tile, void* workspace,
                        ConvWgradTmaArguments* made);

// conv_wgrad's launches of one dtype; index: in WgradTmaTiles.
int launch_conv_wgrad_tma_bfloat16(const ConvWgradTmaArguments& arguments, int index, void* stream);
int launch_conv_wgrad_tma_float16(const ConvWgradTmaArguments& arguments, int index, void* stream);

}  // namespace resnet_fused
