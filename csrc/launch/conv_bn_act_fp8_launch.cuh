// The launches of conv_bn_act_fp8 for one type of the output; each type's .cu file makes its own.
#pragma once

#include "../device/quantised_epilogue.h"
#include "conv_bn_act_fp8_tiles.h"
#include "conv_bn_act_tma_launch.cuh"

namespace resnet_fused {

template <class Out>
int launch_conv_bn_act_fp8(const ConvTmaArguments& arguments, int index, int32_t blocks,
                           void* stream) {
  return launch_conv_bn_act_tma<E4M3To<Out>, ConvFp8Tiles>(arguments, index, blocks, stream);
}

}  // namespace resnet_fused
