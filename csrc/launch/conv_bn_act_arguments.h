// From a problem and its plan to what the kernel is told. Pure functions, inside of this room.
#pragma once

#include <cstdint>

#include "../device/conv_geometry.h"
#include "../device/scalar.h"
#include "conv_bn_act.h"
#include "conv_strides.h"

namespace resnet_fused {

// Whether x and weight can be read 16 bytes at a time.
bool reads_wide(const RfConvBnAct& problem);

// How many images wide offsets reach, 31 bits of 16 bytes; 0 if they do not reach over the weights.
int64_t images_in_reach(const RfConvBnAct& problem);

// What images [first, first + images) are read by. wide: 16 bytes at a time.
ConvOperands conv_operands(const RfConvBnAct& problem, bool wide, int64_t first, int64_t images);

// A workspace: one counter a tile, then the tiles' partial sums.
constexpr int64_t kWorkspaceAlignment = 256;  // bytes, as the allocators give
constexpr int64_t arrival_bytes(int64_t tiles) {
  return divide_up(tiles * 4, kWorkspaceAlignment) * kWorkspaceAlignment;
}

// The arguments for images [first, first + images).
ConvBnActArguments conv_bn_act_arguments(const RfConvBnAct& problem, const RfConvPlan& plan,
                                         void* workspace, int64_t first, int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_act_bfloat16(const ConvBnActArguments& arguments, int configuration,
                                void* stream);
int launch_conv_bn_act_float16(const ConvBnActArguments& arguments, int configuration,
                               void* stream);
int launch_conv_bn_act_float32(const ConvBnActArguments& arguments, int configuration,
                               void* stream);

}  // namespace resnet_fused
