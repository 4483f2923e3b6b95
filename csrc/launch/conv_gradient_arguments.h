// From a gradient's problem and plan to what its kernels are told. Pure functions, inside of this
// room.
#pragma once

#include <cstdint>

#include "../device/gradient_geometry.h"
#include "../device/scalar.h"
#include "conv_bn_act_arguments.h"
#include "conv_gradients.h"

namespace resnet_fused {

// Whether every operand that is read can be read 16 bytes at a time. reads_y: y is one of them.
bool dgrad_reads_wide(const RfConvGradient& problem, bool reads_y);
bool wgrad_reads_wide(const RfConvGradient& problem, bool reads_y);
// Whether dy is, and y.
bool wgrad_reads_gradients_wide(const RfConvGradient& problem, bool reads_y);

// Input pixels of one phase of the stride: those of the first one, which has most.
struct PhaseSize {
  int64_t rows;
  int64_t columns;
};
PhaseSize phase_size(const RfConvGradient& problem);
PhasedAxis phased_axis(const RfConvGradient& problem, int dimension);

// The arguments for images [first, first + images), by a plan of that configuration.
ConvDgradArguments conv_dgrad_arguments(const RfConvGradient& problem, const RfConvPlan& plan,
                                        const RfConvConfiguration& tile, void* workspace,
                                        int64_t first, int64_t images);
// Columns of a group's gradient as a tile counts them: by TMA channels come in whole boxes.
int64_t wgrad_columns(const RfConvGradient& problem, const RfConvConfiguration& tile);
WgradProduct wgrad_product(const RfConvGradient& problem, const RfConvPlan& plan,
                           const RfConvConfiguration& tile, void* workspace);
ConvWgradArguments conv_wgrad_arguments(const RfConvGradient& problem, const RfConvPlan& plan,
                                        const RfConvConfiguration& tile, void* workspace);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_dgrad_bfloat16(const ConvDgradArguments& arguments, int configuration,
                               void* stream);
int launch_conv_dgrad_float16(const ConvDgradArguments& arguments, int configuration, void* stream);
int launch_conv_dgrad_float32(const ConvDgradArguments& arguments, int configuration, void* stream);
int launch_conv_wgrad_bfloat16(const ConvWgradArguments& arguments, int configuration,
                               void* stream);
int launch_conv_wgrad_float16(const ConvWgradArguments& arguments, int configuration, void* stream);
int launch_conv_wgrad_float32(const ConvWgradArguments& arguments, int configuration, void* stream);

}  // namespace resnet_fused
