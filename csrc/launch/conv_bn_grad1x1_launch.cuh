// The launches of conv_bn_grad1x1 for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_grad1x1_sm80.cuh"
#include "conv_bn_grad1x1_arguments.h"
#include "conv_bn_grad1x1_merge.cuh"
#include "conv_bn_grad1x1_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_grad1x1(const Grad1x1Arguments& arguments, int configuration, void* stream) {
  const dim3 grid(static_cast<uint32_t>(arguments.columns) *
                  static_cast<uint32_t>(arguments.parts));
  const int error = Grad1x1Tiles::with(configuration, [&]<class Shape>() -> int {
    return RF_LAUNCH((conv_bn_grad1x1_kernel<T, Shape>), grid, dim3(Shape::kThreads),
                     Shape::kSharedBytes, static_cast<cudaStream_t>(stream), arguments);
  });
  return error != 0 ? error : launch_conv_bn_grad1x1_merge<T>(arguments, stream);
}

}  // namespace resnet_fused
