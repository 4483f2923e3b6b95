// What the kernels of conv_bn_dgrad and conv_bn_dgrad_end are told beside the product: what is
// added to the gradient, the BatchNorm and ReLU below, and where their reductions meet. Plain
// values, which a launch computes.
#pragma once

#include <cstdint>

#include "divide.h"
#include "gradient_geometry.h"
#include "portable.h"
#include "tile_chunks.h"

namespace resnet_fused {

// Of a channel's gradient dx: the sum of it, and of it times what raw is off the mean.
struct alignas(8) GradientSums {
  float first;
  float second;
};

// Where the sums of tiles meet.
struct GradientReduction {
  TileChunks all;         // rows of tiles of all launches
  int32_t first_row;      // of this launch
  int64_t channels;       // C, of all groups
  uint32_t* arrivals;     // [group][column of tiles][chunks + 1], zero before the first launch
  GradientSums* partial;  // [row of tiles][C]
  ColumnSums* merged;     // [chunk][C]; unused where there is one chunk
  float* sums;            // [2, C], or, with a third row, [3, C]
};
// Where a third sum of each channel meets, beside the two; both null where there is none.
struct ThirdSums {
  float* partial;      // [row of tiles][C]
  ColumnSums* merged;  // [chunk][C], of which the first is used; unused where there is one chunk
};

struct ConvBnDgradArguments {
  // dy is dz; scale is [3, K] A, B, C, unused where y is null; wide_dx is said of everything that a
  // tile reads and writes at its end.
  ConvDgradArguments conv;
  const void* addend;  // [N, C, ..] at every addend_step-th row and column; null: none
  PixelStrides addend_strides;
  Divisor addend_step;
  const void* raw;  // [N, C, H, W]; null: no ReLU and no reductions
  PixelStrides raw_strides;
  const float* norm;  // [4, C]: scale, shift, mean
  GradientReduction reduction;
  void* counters;  // of the splits and of the reductions: for the launch's clearing
  int64_t cleared_bytes;
};

// Behind the ReLU of a block's end: of norm the mean is read, and raw is never null.
struct ConvBnDgradEndArguments : ConvBnDgradArguments {
  const void* out;  // [N, C, H, W], which says what passed the ReLU
  PixelStrides out_strides;
  const void* residual;  // [N, C, H, W], of a projection; null: none
  PixelStrides residual_strides;
  const float* residual_mean;  // [C]
  ThirdSums third;             // of the projection
};

}  // namespace resnet_fused
