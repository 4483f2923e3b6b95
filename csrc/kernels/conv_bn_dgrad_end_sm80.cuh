// conv_bn_dgrad_end on the GPU, for sm_80 and later: the gradient behind the ReLU of a block's end,
// with that of the convolution behind it.
//
//     dy = A dz + (B y + C)                              as it arrives; 0 outside of the output
//     dx[m, c] = sum over e of dy[m, e] * filter[e, c] [+ addend]     where out passed the ReLU
//     sums = sum dx, sum dx (raw - mean) [, sum dx (residual - residual_mean)]
//
// conv_bn_dgrad's product; its tile's end reads `out` where that one makes BatchNorm's result
// again, and takes a projection's sums beside those of raw.
#pragma once

#include "../device/bn_dgrad_geometry.h"
#include "../device/resident_blocks.h"
#include "conv_bn_dgrad_sm80.cuh"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_dgrad_end_kernel(const __grid_constant__ ConvBnDgradEndArguments arguments) {
  make_bn_gradients<T, Shape, kWidth>(arguments);
}

}  // namespace resnet_fused
