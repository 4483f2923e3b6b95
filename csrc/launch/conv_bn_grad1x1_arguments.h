// From a problem of conv_bn_grad1x1 and its plan to what the kernels are told. Pure functions,
// inside of this room.
#pragma once

#include <cstdint>

#include "../device/grad1x1_geometry.h"
#include "conv_bn_grad1x1.h"
#include "conv_gradient_arguments.h"

namespace resnet_fused {

struct Refusal;

// Refuses what no configuration takes.
int32_t check_grad1x1(const RfConvBnGrad1x1& problem, const Refusal& refuse);

// The name of an operand that the kernel cannot read or write; null: there is none.
const char* askew(const RfConvBnGrad1x1& problem);

// Whether the kernels can read or write [N, C, H, W]: pixel after pixel, 16 bytes at a time.
bool in_pixel_rows(const void* at, const int64_t (&size)[4], const int64_t (&stride)[4]);

// Bytes of what `parts` of the pixels leave.
int64_t grad1x1_workspace(const RfConvBnGrad1x1& problem, int64_t parts);

// tile: the configuration of the plan.
Grad1x1Arguments conv_bn_grad1x1_arguments(const RfConvBnGrad1x1& problem, const RfConvPlan& plan,
                                           const RfConvConfiguration& tile, void* workspace);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_grad1x1_bfloat16(const Grad1x1Arguments& arguments, int configuration,
                                    void* stream);
int launch_conv_bn_grad1x1_float16(const Grad1x1Arguments& arguments, int configuration,
                                   void* stream);

}  // namespace resnet_fused
