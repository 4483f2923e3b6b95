// conv_wgrad for sm_90a: what its plan, its arguments and its launches share. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/wgrad_tma.h"
#include "conv_gradient_choice.h"

namespace resnet_fused {

int32_t wgrad_tma_configurations();
// Null for an index that there is not; index: in WgradTmaTiles.
const RfConvConfiguration* wgrad_tma_configuration(int32_t index);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string wgrad_tma_fault(const RfConvGradient& problem);

// Predicted cycles of so many splits, without what their sums take in memory.
double wgrad_tma_cost(const GradientProduct& product, const RfConvConfiguration& tile,
                      int64_t splits, const RfGpu& gpu);

// Launches what wgrad_tma_fault finds nothing of; 0 or a cudaError_t.
int run_conv_wgrad_tma(const RfConvGradient& problem, const RfConvPlan& plan,
                       const RfConvConfiguration& tile, void* workspace, void* stream);

// The launches of one dtype.
int launch_conv_wgrad_tma_bfloat16(const ConvWgradTmaArguments& arguments, int index, void* stream);
int launch_conv_wgrad_tma_float16(const ConvWgradTmaArguments& arguments, int index, void* stream);

}  // namespace resnet_fused
