#include "cluster.h"

#include <string>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {

uint32_t cluster_rank() { return self().block->rank; }

uint32_t cluster_blocks() { return static_cast<uint32_t>(self().block->cluster->blocks.size()); }

uint32_t cluster_address(Site site, uint32_t address, uint32_t rank) {
  if (rank >= cluster_blocks()) {
    fail(site, "mapa",
         "rank " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster_blocks()));
  }
  return (address & ((1u << kClusterShift) - 1)) | (rank + 1) << kClusterShift;
}

uint8_t* cluster_shared(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                        uint32_t alignment, Access access) {
  const Quiet quiet;
  const FiberThread& thread = self();
  Block& owner = block_of_address(site, instruction, address);
  SharedMemory& memory = owner.shared;
  memory.check_bounds(site, instruction, address, bytes, alignment);
  const uint16_t site_id = owner.grid->session->record_of(site, instruction).id;
  const uint32_t offset = address - kSharedBase;
  uint8_t* pointer = memory.data() + offset;
  if (access == Access::kRead) {
    memory.read(site, instruction, owner, thread, offset, bytes, site_id);
    tell_read(pointer, bytes);
  } else {
    memory.write(site, instruction, owner, thread, offset, bytes, site_id, false);
    tell_write(pointer, bytes);
  }
  return pointer;
}

void Cluster::complete_if_due() {
  if (arrived == 0 || arrived < alive) return;
  Grid& grid = *blocks.front()->grid;
  ++grid.progress;
  ++phase;
  arrived = 0;
  released = std::move(clock);
  clock.clear();
  for (FiberThread* thread : waiting) {
    grid.make_ready(*thread->block, thread->warp, 1u << thread->lane);
  }
  waiting.clear();
}

void Cluster::thread_left(const FiberThread& thread) {
  --alive;
  if (thread.cluster_arrived && thread.cluster_phase == phase) --arrived;
  complete_if_due();
}

void cluster_arrive(Site site) {
  const Quiet quiet;
  FiberThread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived) {
    fail(ErrorKind::kUsage, site, "barrier.cluster.arrive",
         "the thread has arrived before and has not waited since");
  }
  SharedMemory& shared = thread.block->shared;
  const int column = shared.column(thread.warp);
  Clocks::join(cluster.clock, shared.clocks().row(column));
  shared.clocks().advance(column);
  tell_release(&cluster.tokens[cluster.phase & 1]);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  ++cluster.arrived;
  cluster.complete_if_due();
}

void cluster_wait(Site site) {
  const Quiet quiet;
  FiberThread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) {
    fail(ErrorKind::kUsage, site, "barrier.cluster.wait", "the thread has not arrived");
  }
  if (cluster.phase == thread.cluster_phase) {
    cluster.waiting.push_back(&thread);
    thread.block->grid->suspend(thread, {site, "barrier.cluster.wait", -1});
  }
  thread.cluster_arrived = false;
  tell_acquire(&cluster.tokens[thread.cluster_phase & 1]);
  SharedMemory& shared = thread.block->shared;
  shared.clocks().learn(shared.column(thread.warp), cluster.released);
}

}  // namespace resnet_fused::emulator
