// conv_bn_wgrad's window kernel for sm_90a: what its plan, its arguments and its launches share.
// Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/wgrad_window.h"
#include "conv_bn_wgrad.h"
#include "conv_plan.h"
#include "wgrad_window_tiles.h"

namespace resnet_fused {

constexpr int32_t wgrad_window_configurations() { return WgradWindowTiles::kSize; }
// Null for an index that there is not; index: in WgradWindowTiles.
const RfConvConfiguration* wgrad_window_configuration(int32_t index);

// Positions of all images: what the reduction is of.
int64_t wgrad_window_positions(const RfConvGradient& problem);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string wgrad_window_fault(const RfConvBnWgrad& problem, const RfConvConfiguration& tile);

// Predicted cycles of so many splits, without what their sums take in memory.
double wgrad_window_cost(const RfConvBnWgrad& problem, const RfConvConfiguration& tile,
                         int64_t splits, const RfGpu& gpu);

// Launches what wgrad_window_fault finds nothing of; 0 or a cudaError_t. index: in
// WgradWindowTiles.
int run_conv_bn_wgrad_window(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                             const RfConvConfiguration& tile, int index, void* workspace,
                             void* stream);

// The launches of one dtype; shared_bytes: of a block.
int launch_conv_bn_wgrad_window_bfloat16(const BnWgradWindowArguments& arguments, int index,
                                         int32_t shared_bytes, void* stream);
int launch_conv_bn_wgrad_window_float16(const BnWgradWindowArguments& arguments, int index,
                                        int32_t shared_bytes, void* stream);

}  // namespace resnet_fused
