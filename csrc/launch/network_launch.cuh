// The launch of a network for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/network_sm80.cuh"
#include "launch.h"
#include "network_arguments.h"

namespace resnet_fused {

template <class T>
int launch_network(const NetworkArguments& arguments, int32_t blocks, void* stream) {
  return RF_LAUNCH_COOPERATIVE((network_kernel<T, NetworkShape, LoadWidth::kWide>),
                               dim3(static_cast<uint32_t>(blocks)), dim3(NetworkShape::kThreads),
                               NetworkShape::kRingBytes, static_cast<cudaStream_t>(stream),
                               arguments);
}

}  // namespace resnet_fused
