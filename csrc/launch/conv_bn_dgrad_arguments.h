// From a problem of conv_bn_dgrad and its plan to what the kernel is told. Pure functions, inside
// of this room.
#pragma once

#include <cstdint>

#include "../device/bn_dgrad_geometry.h"
#include "conv_bn_dgrad.h"
#include "conv_gradient_arguments.h"

namespace resnet_fused {

// The workspace of a plan: where in it what lies, in bytes.
struct BnDgradLayout {
  TileChunks all;  // rows of tiles of all launches
  int32_t rows_a_launch;
  int64_t arrivals;  // counters of the reductions, behind those of the splits
  int64_t counted;   // the end of all counters: so much is cleared ahead of the first launch
  int64_t sums;      // of the tiles
  int64_t merged;    // of the chunks
  int64_t partial;   // of the splits
  int64_t bytes;
};
BnDgradLayout bn_dgrad_layout(const RfConvBnDgrad& problem, const RfConvConfiguration& tile,
                              int32_t splits, int64_t images_a_launch);

// Where a launch's sums meet, of images from `first` on.
GradientReduction gradient_reduction(const RfConvBnDgrad& problem, const BnDgradLayout& layout,
                                     const RfConvPlan& plan, void* workspace, int64_t first);

// The arguments for images [first, first + images), which begin a launch of the plan's.
ConvBnDgradArguments conv_bn_dgrad_arguments(const RfConvBnDgrad& problem, const RfConvPlan& plan,
                                             void* workspace, int64_t first, int64_t images);

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_dgrad_bfloat16(const ConvBnDgradArguments& arguments, int configuration,
                                  void* stream);
int launch_conv_bn_dgrad_float16(const ConvBnDgradArguments& arguments, int configuration,
                                 void* stream);
int launch_conv_bn_dgrad_float32(const ConvBnDgradArguments& arguments, int configuration,
                                 void* stream);

}  // namespace resnet_fused
