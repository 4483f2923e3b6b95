// The launches of conv_bn_grad1x1_end for sm_80 and later, for one dtype; each dtype's .cu file
// makes its own.
#pragma once

#include "../kernels/conv_bn_grad1x1_end_sm80.cuh"
#include "conv_bn_grad1x1_end_mma.h"
#include "conv_bn_grad1x1_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_grad1x1_end(const Grad1x1EndArguments& arguments, int index, void* stream) {
  const Grad1x1Arguments& shared = arguments.shared;
  const dim3 grid(static_cast<uint32_t>(shared.columns) * static_cast<uint32_t>(shared.parts));
  const int error = Grad1x1EndTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH((conv_bn_grad1x1_end_kernel<T, Shape>), grid, dim3(Shape::kThreads),
                     Shape::kSharedBytes, static_cast<cudaStream_t>(stream), arguments);
  });
  return error != 0 ? error : launch_conv_bn_grad1x1_merge<T>(shared, stream);
}

}  // namespace resnet_fused
