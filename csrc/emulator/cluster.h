// Clusters: blocks that run together, share a barrier, and reach each other's shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace resnet_fused::emulator {

struct Block;
struct FiberThread;

// A shared address of another block of the cluster carries that block's rank + 1 from this bit on.
constexpr uint32_t kClusterShift = 24;
constexpr uint32_t kMostBlocksOfACluster = 8;  // that every GPU with clusters allows

uint32_t cluster_rank();
uint32_t cluster_blocks();
// mapa: the address in the block of that rank of what is at `address` in the running block.
uint32_t cluster_address(Site site, uint32_t address, uint32_t rank);
// A load or store of the running thread in the shared memory of any block of the cluster, as
// cluster_address gives its address: as emulator::shared, but for the counters.
uint8_t* cluster_shared(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                        uint32_t alignment, Access access);
// barrier.cluster: every thread of the cluster that has not left arrives, then waits.
void cluster_arrive(Site site);
void cluster_wait(Site site);

// The runtime's side.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  int alive = 0;               // threads
  int arrived = 0;             // of them, at the barrier's present phase
  uint64_t phase = 0;
  std::vector<uint32_t> clock;     // what the arrivals of this phase make visible
  std::vector<uint32_t> released;  // what the last one's did
  std::vector<FiberThread*> waiting;
  char tokens[2] = {};  // ThreadSanitizer's

  void complete_if_due();
  void thread_left(const FiberThread& thread);
};

}  // namespace resnet_fused::emulator
