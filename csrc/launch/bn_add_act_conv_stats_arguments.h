// From a problem of bn_add_act_conv_stats and its plan to what the kernel is told. Pure functions,
// inside of this room.
#pragma once

#include <cstdint>

#include "../device/block_end_geometry.h"
#include "bn_add_act_conv_stats.h"
#include "conv_bn_stats_arguments.h"

namespace resnet_fused {

// The name of an operand that the kernel cannot read or write; null: there is none.
const char* askew(const RfBnAddActConvStats& problem);

BlockEndArguments bn_add_act_conv_stats_arguments(const RfBnAddActConvStats& problem,
                                                  const RfConvPlan& plan, void* workspace,
                                                  int64_t first, int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_bn_add_act_conv_stats_bfloat16(const BlockEndArguments& arguments, int configuration,
                                          void* stream);
int launch_bn_add_act_conv_stats_float16(const BlockEndArguments& arguments, int configuration,
                                         void* stream);
int launch_bn_add_act_conv_stats_float32(const BlockEndArguments& arguments, int configuration,
                                         void* stream);

}  // namespace resnet_fused
