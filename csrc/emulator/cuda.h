// What nvcc's language gives a kernel, for a plain C++ compiler: qualifiers, index variables,
// vector types and the few names of the CUDA runtime that the launches use.
#pragma once

#include <cstdint>

#include "thread.h"

#if !defined(RF_EMULATED)
#error "csrc/emulator/cuda.h stands in for nvcc: define RF_EMULATED, or include CUDA's own headers"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

using resnet_fused::emulator::dim3;
using resnet_fused::emulator::uint3;

// Macros, because each fiber sees values of its own and the host may have several threads.
#define threadIdx (::resnet_fused::emulator::this_thread().thread_index)
#define blockIdx (::resnet_fused::emulator::this_thread().block_index)
#define blockDim (::resnet_fused::emulator::this_thread().block_size)
#define gridDim (::resnet_fused::emulator::this_thread().grid_size)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Streams have no meaning here: a launch has run when it returns.
using cudaStream_t = struct CUstream_st*;

// The codes have CUDA's values, so that a launch returns the same number either way.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unknown error";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a failing launch throws
