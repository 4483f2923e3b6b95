// What every wrapper of csrc/ptx needs: who may call it, and from which line it was called.
//
// RF_DEVICE marks a function of the device; under the emulator it is an inline function of the
// host. RF_SITE_PARAMETER ends a wrapper's parameter list (RF_SITE_ONLY is the whole list of one
// without parameters). Under the emulator it is the caller's file and line, which name a fault's
// place, an error's place and a counter's; nvcc sees nothing. RF_SITE hands the caller's place on.
#pragma once

#include <cstdint>

#if defined(RF_EMULATED)
#include "../emulator/cuda.h"
#include "../emulator/runtime.h"
#define RF_DEVICE inline
#define RF_SITE_ONLY ::resnet_fused::emulator::Site site = ::resnet_fused::emulator::Site::here()
#define RF_SITE_PARAMETER , RF_SITE_ONLY
#define RF_SITE_LAST site
#define RF_SITE , site
#else
#define RF_DEVICE __device__ __forceinline__
#define RF_SITE_ONLY
#define RF_SITE_PARAMETER
#define RF_SITE_LAST
#define RF_SITE
#endif

// Whether the code that is being compiled may hold instructions that came with sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RF_SM90 1
#endif
// ... or of sm_90a alone, which no later GPU runs.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RF_SM90A 1
#endif

namespace resnet_fused::ptx {

#if !defined(RF_EMULATED)
namespace detail {
// What an instruction becomes where there is none: kernels for older GPUs do not reach it.
RF_DEVICE void missing() {
#if defined(__CUDA_ARCH__)
  __trap();
#endif
}
}  // namespace detail
#endif

using SharedAddress = uint32_t;  // bytes in the block's shared window (PTX ISA, State Spaces)

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
constexpr int kWarpSize = 32;

}  // namespace resnet_fused::ptx
