// The launches of conv_bn_grad1x1 for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_grad1x1_merge_sm80.cuh"
#include "../kernels/conv_bn_grad1x1_sm80.cuh"
#include "conv_bn_grad1x1_arguments.h"
#include "conv_bn_grad1x1_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_grad1x1(const Grad1x1Arguments& arguments, int configuration, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<uint32_t>(arguments.columns) *
                  static_cast<uint32_t>(arguments.parts));
  const int error = Grad1x1Tiles::with(configuration, [&]<class Shape>() -> int {
    return RF_LAUNCH((conv_bn_grad1x1_kernel<T, Shape>), grid, dim3(Shape::kThreads),
                     Shape::kSharedBytes, cuda_stream, arguments);
  });
  if (error != 0) return error;
  const int64_t rows = arguments.filters + (arguments.norm != nullptr ? 2 : 0);
  const dim3 blocks(static_cast<uint32_t>((rows * arguments.channels + kGrad1x1MergeThreads - 1) /
                                          kGrad1x1MergeThreads));
  const auto merge = [&]<class Result>() -> int {
    return RF_LAUNCH(conv_bn_grad1x1_merge_kernel<Result>, blocks, dim3(kGrad1x1MergeThreads), 0,
                     cuda_stream, arguments);
  };
  return arguments.float_dweight ? merge.template operator()<float>()
                                 : merge.template operator()<T>();
}

}  // namespace resnet_fused
