// Who does what in a block of the kernels for sm_90a whose first warpgroup feeds the others.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/registers.h"
#include "dependent.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

#if defined(RF_HAS_REGISTER_LIMITS)

// Behind the barriers' making: one thread of the first warpgroup produces; each of the others, with
// the registers that the first one has no need of, consumes. consume: of (which of them, thread of
// the warpgroup).
template <class Produce, class Consume>
RF_DEVICE void take_roles(const Produce& produce, const Consume& consume) {
  const uint32_t warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce();
  } else {
    ptx::increase_registers<kConsumerRegisters>();
    consume(warpgroup - 1, threadIdx.x % kWarpgroupThreads);
  }
}

// The same behind what may come before the kernel ahead has ended.
template <class Produce, class Consume>
RF_DEVICE void run_roles(bool dependent, const Produce& produce,
                         const Consume& consume RF_SITE_PARAMETER) {
  ptx::sync_threads(RF_SITE_LAST);
  wait_for_ahead(dependent RF_SITE);
  take_roles(produce, consume);
}

#endif

}  // namespace resnet_fused
