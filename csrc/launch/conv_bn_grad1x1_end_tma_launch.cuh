// The launches of conv_bn_grad1x1_end for sm_90a, for one dtype; each dtype's .cu file makes its
// own.
#pragma once

#include "../kernels/conv_bn_grad1x1_end_sm90.cuh"
#include "conv_bn_grad1x1_end_tiles.h"
#include "conv_bn_grad1x1_end_tma.h"
#include "conv_bn_grad1x1_merge.cuh"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_grad1x1_end_tma(const Grad1x1EndTmaArguments& arguments, int index,
                                   void* stream) {
  const Grad1x1Arguments& shared = arguments.image.shared;
  const int error = Grad1x1EndTmaTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH(
        (conv_bn_grad1x1_end_tma_kernel<T, Shape>),
        dim3(static_cast<uint32_t>(shared.columns) * static_cast<uint32_t>(shared.parts)),
        dim3(kWarpgroupBlockThreads), Shape::kSharedBytes, static_cast<cudaStream_t>(stream),
        arguments);
  });
  return error != 0 ? error : launch_conv_bn_grad1x1_merge<T>(shared, stream);
}

}  // namespace resnet_fused
