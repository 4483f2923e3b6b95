// The launches of conv_bn_act's window kernel for sm_90a, for one type; each type's .cu file makes
// its own.
#pragma once

#include "../kernels/conv_bn_act_window_sm90.cuh"
#include "conv_bn_act_window.h"
#include "launch.h"

namespace resnet_fused {

// T: as of ConvTypes. Tiles: where `index` points into.
template <class T, class Tiles>
int launch_conv_bn_act_window(const ConvWindowArguments& arguments, int index,
                              const WindowGrid& grid, void* stream) {
  return Tiles::with(index, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (conv_bn_act_window_kernel<T, Shape>),
                           dim3(static_cast<uint32_t>(grid.blocks)), dim3(kWarpgroupBlockThreads),
                           static_cast<uint32_t>(grid.shared_bytes),
                           static_cast<cudaStream_t>(stream), arguments);
  });
}

}  // namespace resnet_fused
