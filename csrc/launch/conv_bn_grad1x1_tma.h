// conv_bn_grad1x1 for sm_90a: what its plan, its arguments and its launches share. Inside of this
// room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/grad1x1_tma.h"
#include "conv_bn_grad1x1_arguments.h"

namespace resnet_fused {

// Of an index in Grad1x1TmaTiles: "tma_64x256_4s", and the entry of a table without it.
std::string grad1x1_tma_name(int index);
RfConvConfiguration grad1x1_tma_configuration(int index);

// What keeps a problem whose operands are readable from TMA, with the argument's name; empty if
// nothing does.
std::string grad1x1_tma_fault(const RfConvBnGrad1x1& problem, int index);

// Predicted cycles of so many parts.
double grad1x1_tma_cost(const RfConvBnGrad1x1& problem, int index, int64_t parts, const RfGpu& gpu);

// Launches a plan of which grad1x1_tma_fault finds nothing; 0 or a cudaError_t.
int run_conv_bn_grad1x1_tma(const RfConvBnGrad1x1& problem, const RfConvPlan& plan, void* workspace,
                            void* stream);

// The launches of one dtype.
int launch_conv_bn_grad1x1_tma_bfloat16(const Grad1x1TmaArguments& arguments, int index,
                                        void* stream);
int launch_conv_bn_grad1x1_tma_float16(const Grad1x1TmaArguments& arguments, int index,
                                       void* stream);

}  // namespace resnet_fused
