// The launches of conv_bn_act_fp8 for one type of the output; each type's .cu file makes its own.
#pragma once

#include "../device/quantised_epilogue.h"
#include "../kernels/conv_bn_act_sm90.cuh"
#include "conv_bn_act_fp8_tiles.h"
#include "launch.h"

namespace resnet_fused {

template <class Out>
int launch_conv_bn_act_fp8(const ConvTmaArguments& arguments, int index, int32_t blocks,
                           void* stream) {
  return ConvFp8Tiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_tma_kernel<E4M3To<Out>, Shape>),
                           dim3(static_cast<uint32_t>(blocks)), dim3(kWarpgroupBlockThreads),
                           Shape::kSharedBytes, static_cast<cudaStream_t>(stream), arguments);
  });
}

}  // namespace resnet_fused
