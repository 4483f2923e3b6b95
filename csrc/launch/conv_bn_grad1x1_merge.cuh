// The launch of what adds up the parts of conv_bn_grad1x1, whichever kernel has left them.
#pragma once

#include "../kernels/conv_bn_grad1x1_merge_sm80.cuh"
#include "launch.h"

namespace resnet_fused {

// T: of the operands.
template <class T>
int launch_conv_bn_grad1x1_merge(const Grad1x1Arguments& arguments, void* stream) {
  const int64_t rows = arguments.filters + arguments.sum_rows;
  const dim3 blocks(static_cast<uint32_t>((rows * arguments.channels + kGrad1x1MergeElements - 1) /
                                          kGrad1x1MergeElements));
  const auto merge = [&]<class Result>() -> int {
    return RF_LAUNCH(conv_bn_grad1x1_merge_kernel<Result>, blocks, dim3(kGrad1x1MergeThreads),
                     kGrad1x1MergeBytes, static_cast<cudaStream_t>(stream), arguments);
  };
  return arguments.float_dweight ? merge.template operator()<float>()
                                 : merge.template operator()<T>();
}

}  // namespace resnet_fused
