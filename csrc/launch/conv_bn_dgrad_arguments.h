// From a problem of conv_bn_dgrad and its plan to what the kernel is told. Pure functions, inside
// of this room.
#pragma once

#include <cstdint>

#include "../device/bn_dgrad_geometry.h"
#include "conv_bn_dgrad.h"
#include "conv_gradient_arguments.h"

namespace resnet_fused {

// Rows of sums: of the gradient, of it by the BatchNorm below; by a projection's, too.
constexpr int kSumRows = 2;
constexpr int kProjectedSumRows = 3;

// The workspace of a plan: where in it what lies, in bytes.
struct BnDgradLayout {
  TileChunks all;  // rows of tiles of all launches
  int32_t rows_a_launch;
  int64_t arrivals;  // counters of the reductions, behind those of the splits
  int64_t counted;   // the end of all counters: so much is cleared ahead of the first launch
  int64_t sums;      // of the tiles
  int64_t merged;    // of the chunks
  int64_t third;     // a third sum of the tiles, where there is one
  int64_t thirds_merged;
  int64_t partial;  // of the splits
  int64_t bytes;
};
BnDgradLayout bn_dgrad_layout(const RfConvBnDgrad& problem, const RfConvConfiguration& tile,
                              int32_t splits, int64_t images_a_launch, int sum_rows = kSumRows);

// Where a launch's sums meet, of images from `first` on.
GradientReduction gradient_reduction(const RfConvBnDgrad& problem, const BnDgradLayout& layout,
                                     const RfConvPlan& plan, void* workspace, int64_t first);
// And where a third row of them does, of a layout that has one.
ThirdSums third_sums(const BnDgradLayout& layout, void* workspace);

// The arguments for images [first, first + images), which begin a launch of the plan's, by its
// configuration and what a layout is of these.
ConvBnDgradArguments conv_bn_dgrad_arguments(const RfConvBnDgrad& problem, const RfConvPlan& plan,
                                             const RfConvConfiguration& tile,
                                             const BnDgradLayout& layout, void* workspace,
                                             int64_t first, int64_t images);

// The launches of a plan, until one fails: launch(first, count) of those images.
template <class Launch>
int launch_parts(const RfConvPlan& plan, int64_t images, const Launch& launch) {
  for (int64_t i = 0; i < plan.launches; ++i) {
    const int64_t first = i * plan.images_a_launch;
    const int64_t left = images - first;
    const int error = launch(first, left < plan.images_a_launch ? left : plan.images_a_launch);
    if (error != 0) return error;
  }
  return 0;
}

// The launches of one dtype, each in a file of its own to be compiled side by side.
int launch_conv_bn_dgrad_bfloat16(const ConvBnDgradArguments& arguments, int configuration,
                                  void* stream);
int launch_conv_bn_dgrad_float16(const ConvBnDgradArguments& arguments, int configuration,
                                 void* stream);
int launch_conv_bn_dgrad_float32(const ConvBnDgradArguments& arguments, int configuration,
                                 void* stream);

}  // namespace resnet_fused
