// conv_bn_grad1x1_end on the GPU, for sm_90a: conv_bn_grad1x1 whose input is a block's end.
//
//     dx^T[c, m] = (sum over k of weight[k, c] dy[m, k] [+ addend[m, c]]), 0 where out[m, c] <= 0
//     dweight^T[c, k] = sum over m of out[m, c] dy[m, k]
//
// Steps, roles and products are those of conv_bn_grad1x1_sm90.cuh; a step's end is another one, see
// grad1x1_end.h.
#pragma once

#include "../device/grad1x1_end.h"
#include "conv_bn_grad1x1_sm90.cuh"

namespace resnet_fused {

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_grad1x1_end_tma_kernel(const __grid_constant__ Grad1x1EndTmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  run_grad1x1<T, Shape, Grad1x1EndFinish<T, Shape>>(arguments.image, arguments);
#endif
}

}  // namespace resnet_fused
