// Who does what in a block of the kernels for sm_90a whose first warpgroup feeds the others.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/registers.h"
#include "dependent.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

#if defined(RF_HAS_REGISTER_LIMITS)

// The role of the first warpgroup's other warps where nothing is transformed.
struct Idle {
  template <class... Arguments>
  RF_DEVICE void operator()(const Arguments&...) const {}
};

// Behind the barriers' making: one thread of the first warpgroup produces, and with kTransforms its
// other warps transform; each of the other warpgroups, with the registers that the first one has no
// need of, consumes. consume: of (which of them, thread of the warpgroup); transform: of the thread
// among those that do. kFirst: registers of a thread of the first warpgroup.
template <bool kTransforms = false,
          int kFirst = kTransforms ? kTransformRegisters : kProducerRegisters, class Produce,
          class Consume, class Transform = Idle>
RF_DEVICE void take_roles(const Produce& produce, const Consume& consume,
                          const Transform& transform = {}) {
  const uint32_t warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    ptx::decrease_registers<kFirst>();
    if (threadIdx.x == 0) produce();
    if (kTransforms && threadIdx.x >= 32) transform(threadIdx.x - 32);
  } else {
    ptx::increase_registers<kRegistersBeside<kFirst>>();
    consume(warpgroup - 1, threadIdx.x % kWarpgroupThreads);
  }
}

// The same behind what may come before the kernel ahead has ended.
template <bool kTransforms = false,
          int kFirst = kTransforms ? kTransformRegisters : kProducerRegisters, class Produce,
          class Consume, class Transform = Idle>
RF_DEVICE void run_roles(
    bool dependent, const Produce& produce, const Consume& consume,
    const Transform& transform = {} RF_SITE_PARAMETER) {
  ptx::sync_threads(RF_SITE_LAST);
  wait_for_ahead(dependent RF_SITE);
  take_roles<kTransforms, kFirst>(produce, consume, transform);
}

#endif

}  // namespace resnet_fused
