// From a problem of conv_bn_dgrad_end and its plan to what the kernel is told. Pure functions,
// inside of this room.
#pragma once

#include <cstdint>

#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_end.h"

namespace resnet_fused {

// As of conv_bn_dgrad, with a third row of sums behind a projection.
BnDgradLayout bn_dgrad_end_layout(const RfConvBnDgradEnd& problem, const RfConvConfiguration& tile,
                                  int32_t splits, int64_t images_a_launch);

// The arguments for images [first, first + images), which begin a launch of the plan's.
ConvBnDgradEndArguments conv_bn_dgrad_end_arguments(const RfConvBnDgradEnd& problem,
                                                    const RfConvPlan& plan,
                                                    const RfConvConfiguration& tile,
                                                    void* workspace, int64_t first, int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_dgrad_end_bfloat16(const ConvBnDgradEndArguments& arguments, int configuration,
                                      void* stream);
int launch_conv_bn_dgrad_end_float16(const ConvBnDgradEndArguments& arguments, int configuration,
                                     void* stream);
int launch_conv_bn_dgrad_end_float32(const ConvBnDgradEndArguments& arguments, int configuration,
                                     void* stream);

}  // namespace resnet_fused
