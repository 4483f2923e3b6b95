// conv_dgrad for sm_90a: what its plan, its arguments and its launches share. Inside of this room.
//
// By a stride of 1 the gradient of an input is a convolution itself, so that all but the filters'
// boxes and the mask is conv_bn_act's (conv_bn_act_tma.h).
#pragma once

#include <cstdint>
#include <string>

#include "../device/dgrad_tma.h"
#include "conv_bn_act_tma.h"
#include "conv_gradients.h"

namespace resnet_fused {

int32_t dgrad_tma_configurations();
// Null for an index that there is not; index: in DgradTmaTiles.
const RfConvConfiguration* dgrad_tma_configuration(int32_t index);

// What keeps a problem from it, with the argument's name; empty if nothing does.
std::string dgrad_tma_fault(const RfConvGradient& problem, int index, int64_t images);

// Of one launch over so many images: predicted cycles, and its blocks.
double dgrad_tma_cost(const RfConvGradient& problem, int index, int64_t images, const RfGpu& gpu);
int64_t dgrad_tma_blocks(const RfConvGradient& problem, int index, int64_t images,
                         const RfGpu& gpu);

// Launches images [first, first + images), of which dgrad_tma_fault finds nothing; 0 or a
// cudaError_t.
int run_conv_dgrad_tma(const RfConvGradient& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream);

// The launches of one dtype; `blocks`: of the grid.
int launch_conv_dgrad_tma_bfloat16(const ConvDgradTmaArguments& arguments, int index,
                                   int32_t blocks, void* stream);
int launch_conv_dgrad_tma_float16(const ConvDgradTmaArguments& arguments, int index, int32_t blocks,
                                  void* stream);

}  // namespace resnet_fused
