// Fences between the generic proxy, through which threads load and store, and the async proxy,
// through which TMA and wgmma do. PTX ISA, Memory Consistency Model, Proxies; membar, fence.proxy;
// Asynchronous Operations. sm_90 and later.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include "../emulator/async_proxy.h"
#endif

namespace resnet_fused::ptx {

// What this thread has written to shared memory is seen by asynchronous instructions that are
// issued behind it, by this thread or, after a barrier, by others. Publishes no other thread's
// writes: each writer fences for itself, before the barrier.
RF_DEVICE void fence_proxy_async_shared(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "fence.proxy.async", {emulator::Fault::kNoFence});
  if (fault != emulator::Fault::kNoFence) emulator::proxy_fence(site);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace resnet_fused::ptx
