// conv_bn_grad1x1_end on the GPU, for sm_80 and later: conv_bn_grad1x1 whose input is a block's
// end.
//
//     dx[m, c] = (sum over k of dy[m, k] weight[k, c] [+ addend[m, c]]), 0 where out[m, c] <= 0
//     dweight[k, c] = sum over m of dy[m, k] out[m, c]
//     sums = sum dx, sum dx (raw - mean) [, sum dx (residual - residual_mean)]
//
// Steps and products are those of conv_bn_grad1x1_sm80.cuh; a step's end is another one, see
// grad1x1_rows_end.h.
#pragma once

#include "../device/grad1x1_rows_end.h"
#include "conv_bn_grad1x1_sm80.cuh"

namespace resnet_fused {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    conv_bn_grad1x1_end_kernel(const __grid_constant__ Grad1x1EndArguments arguments) {
  Grad1x1Block<T, Shape, Grad1x1RowsEnd<T, Shape>> block(
      arguments, blockIdx.x, threadIdx.x, ptx::shared_address(ptx::dynamic_shared()));
  block.run(threadIdx.x);
}

}  // namespace resnet_fused
