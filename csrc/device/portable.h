// What lets one header serve nvcc's device code, nvcc's host code and a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define RF_HOST_DEVICE __forceinline
#else
#define RF_HOST_DEVICE inline __attribute__((always_inline))
#endif

#if defined(_MSC_VER)
#define RF_RESTRICT __restrict
#else
#define RF_RESTRICT __restrict__
#endif

// The CPU kernels are compiled once per instruction set. Everything that they inline must then have
// a name of its own per instruction set, or the linker could hand AVX-512 code to an old CPU.
#if defined(RF_ISA)
#define RF_NAMESPACE_BEGIN \
  namespace resnet_fused { \
  inline namespace RF_ISA {
#define RF_NAMESPACE_END \
  }                      \
  }
#else
#define RF_NAMESPACE_BEGIN namespace resnet_fused {
#define RF_NAMESPACE_END }
#endif
