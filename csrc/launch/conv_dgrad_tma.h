// conv_dgrad for sm_90a: what its plan and its launches share. Inside of this room.
#pragma once

#include <cstdint>

#include "dgrad_tma.h"

namespace resnet_fused {

// Launches images [first, first + images), of which dgrad_tma_fault finds nothing; 0 or a
// cudaError_t.
int run_conv_dgrad_tma(const RfConvGradient& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream);

// The launches of one dtype; index: in DgradTmaTiles; `blocks`: of the grid.
int launch_conv_dgrad_tma_bfloat16(const ConvDgradTmaArguments& arguments, int index,
                                   int32_t blocks, void* stream);
int launch_conv_dgrad_tma_float16(const ConvDgradTmaArguments& arguments, int index, int32_t blocks,
                                  void* stream);

}  // namespace resnet_fused
