// The launches of conv_bn_act's window kernel for sm_90a, for one dtype; each dtype's .cu file
// makes its own.
#pragma once

#include "../kernels/conv_bn_act_window_sm90.cuh"
#include "conv_bn_act_window.h"
#include "launch.h"

namespace resnet_fused {

template <class T>
int launch_conv_bn_act_window(const ConvWindowArguments& arguments, int index, int32_t blocks,
                              int32_t shared_bytes, void* stream) {
  return ConvWindowTiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_window_kernel<T, Shape>),
                           dim3(static_cast<uint32_t>(blocks)), dim3(kWarpgroupBlockThreads),
                           static_cast<uint32_t>(shared_bytes), static_cast<cudaStream_t>(stream),
                           arguments);
  });
}

}  // namespace resnet_fused
