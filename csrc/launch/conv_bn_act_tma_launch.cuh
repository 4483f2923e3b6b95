// The launches of conv_bn_act for sm_90a, for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/conv_bn_act_sm90.cuh"
#include "conv_bn_act_tma.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_act_tma(const ConvTmaArguments& arguments, int index, int32_t blocks,
                           void* stream) {
  return ConvTmaTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_tma_kernel<T, Shape>),
                           dim3(static_cast<uint32_t>(blocks)), dim3(kWarpgroupBlockThreads),
                           Shape::kSharedBytes, static_cast<cudaStream_t>(stream), arguments);
  });
}

}  // namespace resnet_fused
