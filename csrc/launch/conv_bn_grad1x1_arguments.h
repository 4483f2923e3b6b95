// From a problem of conv_bn_grad1x1 and its plan to what the kernels are told. Pure functions,
// inside of this room.
#pragma once

#include <cstdint>

#include "../device/grad1x1_geometry.h"
#include "conv_bn_grad1x1.h"
#include "conv_gradient_arguments.h"

namespace resnet_fused {

// The name of an operand that the kernel cannot read or write; null: there is none.
const char* askew(const RfConvBnGrad1x1& problem);

// Bytes of what `parts` of the pixels leave.
int64_t grad1x1_workspace(const RfConvBnGrad1x1& problem, int64_t parts);

Grad1x1Arguments conv_bn_grad1x1_arguments(const RfConvBnGrad1x1& problem, const RfConvPlan& plan,
                                           void* workspace);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_grad1x1_bfloat16(const Grad1x1Arguments& arguments, int configuration,
                                    void* stream);
int launch_conv_bn_grad1x1_float16(const Grad1x1Arguments& arguments, int configuration,
                                   void* stream);

}  // namespace resnet_fused
