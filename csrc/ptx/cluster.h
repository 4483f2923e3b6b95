// Clusters of blocks. PTX ISA: barrier.cluster, mapa, %cluster_ctarank, %cluster_nctarank. sm_90
// and later.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include "../emulator/cluster.h"
#endif

namespace resnet_fused::ptx {

// The block's number in its cluster, and how many blocks that has; 0 and 1 without clusters.
RF_DEVICE uint32_t cluster_rank() {
#if defined(RF_EMULATED)
  return emulator::cluster_rank();
#elif defined(RF_SM90)
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
RF_DEVICE uint32_t cluster_blocks() {
#if defined(RF_EMULATED)
  return emulator::cluster_blocks();
#elif defined(RF_SM90)
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

// The address, in the shared memory of the cluster's block `rank`, of what this block has at
// `address`: for the instructions that say so.
RF_DEVICE SharedAddress cluster_address(SharedAddress address, uint32_t rank RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "mapa", {emulator::Fault::kWrongLane});
  if (fault == emulator::Fault::kWrongLane) rank = (rank + 1) % emulator::cluster_blocks();
  return emulator::cluster_address(site, address, rank);
#elif defined(RF_SM90)
  SharedAddress mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  detail::missing();
  return address;
#endif
}

// Every thread of the cluster arrives, then waits for the others; what they did before is seen. A
// block must not end while others may still reach into its shared memory: it waits here before.
RF_DEVICE void cluster_arrive(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "barrier.cluster.arrive", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::cluster_arrive(site);
#elif defined(RF_SM90)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
RF_DEVICE void cluster_wait(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "barrier.cluster.wait", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::cluster_wait(site);
#elif defined(RF_SM90)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
RF_DEVICE void cluster_sync(RF_SITE_ONLY) {
  ptx::cluster_arrive(RF_SITE_LAST);  // the emulator has one of that name
  ptx::cluster_wait(RF_SITE_LAST);
}

}  // namespace resnet_fused::ptx
