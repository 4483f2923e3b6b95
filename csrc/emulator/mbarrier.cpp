#include "mbarrier.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

void complete_if_due(Block& owner, MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  Grid& grid = *owner.grid;
  Clocks& clocks = owner.shared.clocks();
  ++grid.progress;
  for (int scope = 0; scope < kScopes; ++scope) {
    std::vector<uint32_t>& released = barrier.released[scope];
    Clocks::join(released, barrier.clock[scope]);
    barrier.clock[scope].clear();
    if (released.size() <= static_cast<size_t>(barrier.column)) {
      released.resize(static_cast<size_t>(barrier.column) + 1, 0);
    }
    released[barrier.column] = clocks.epoch(barrier.column);
  }
  clocks.advance(barrier.column);
  barrier.pending = barrier.count;
  ++barrier.phase;
  for (FiberThread* thread : barrier.waiting) {
    grid.make_ready(*thread->block, thread->warp, 1u << thread->lane);
  }
  barrier.waiting.clear();
}

void add_bytes(Site site, const char* instruction, MBarrier& barrier, int64_t bytes) {
  barrier.bytes += bytes;
  if (barrier.bytes >= -kMostPending && barrier.bytes <= kMostPending) return;
  fail(site, instruction,
       describe(barrier) + ": expected at most " + std::to_string(kMostPending) + " bytes");
}

void check_count(Site site, const char* instruction, uint32_t count) {
  if (count >= 1 && count <= kMostPending) return;
  fail(site, instruction,
       "a count of " + std::to_string(count) + ": expected 1 to " + std::to_string(kMostPending));
}

void check_own(Site site, const char* instruction, const Block& owner) {
  if (&owner != self().block) fail(site, instruction, "an mbarrier of another block");
}

// The narrowest wait that learns of an arrival.
Scope told(const Block& owner, const FiberThread& thread, Scope scope) {
  if (scope == Scope::kNowhere) return scope;
  if (thread.block == &owner) return Scope::kBlock;
  return scope == Scope::kCluster ? scope : Scope::kNowhere;
}

bool complete(const MBarrier& barrier, Site site, const char* instruction, AwaitedPhase phase) {
  if (phase.by_parity) return (barrier.phase & 1) != (phase.value & 1);
  if (phase.value > barrier.phase || phase.value + 1 < barrier.phase) {
    fail(site, instruction,
         "a state of phase " + std::to_string(phase.value) + ", but " + describe(barrier) +
             ": expected this phase or the one before");
  }
  return phase.value < barrier.phase;
}

}  // namespace

std::string describe(const MBarrier& barrier) {
  std::string text = "mbarrier at byte " + std::to_string(barrier.offset) + ", phase " +
                     std::to_string(barrier.phase) + " (parity " +
                     std::to_string(barrier.phase & 1) + "): " + std::to_string(barrier.pending) +
                     " of " + std::to_string(barrier.count) + " arrivals missing";
  if (barrier.bytes > 0) text += ", " + std::to_string(barrier.bytes) + " bytes missing";
  if (barrier.bytes < 0) {
    text += ", " + std::to_string(-barrier.bytes) + " bytes more than expected";
  }
  return text;
}

Block& block_of_address(Site site, const char* instruction, uint32_t& address) {
  Block& own = *self().block;
  const uint32_t rank = address >> kClusterShift;
  address &= (1u << kClusterShift) - 1;
  if (rank == 0) return own;
  if (rank > own.cluster->blocks.size()) {
    fail(ErrorKind::kAddress, site, instruction,
         "an address of block " + std::to_string(rank - 1) + " of a cluster of " +
             std::to_string(own.cluster->blocks.size()));
  }
  Block& owner = *own.cluster->blocks[rank - 1];
  if (owner.alive == 0) {
    fail(ErrorKind::kState, site, instruction,
         "shared memory of block " + std::to_string(rank - 1) +
             " of the cluster, which has left the kernel");
  }
  return owner;
}

MBarrier& find_mbarrier(Site site, const char* instruction, Block& owner, uint32_t address) {
  owner.shared.check_bounds(site, instruction, address, kBarrierBytes, kBarrierBytes);
  const uint32_t offset = address - kSharedBase;
  const auto found = owner.mbarriers.find(offset);
  if (found == owner.mbarriers.end()) {
    fail(ErrorKind::kState, site, instruction,
         "there is no mbarrier at byte " + std::to_string(offset) + " of dynamic shared memory");
  }
  owner.shared.use_barrier(site, instruction, owner, self(), offset);
  return found->second;
}

MBarrier& find_copy_barrier(Site site, const char* instruction, Block& owner, uint32_t address) {
  MBarrier& barrier = find_mbarrier(site, instruction, owner, address);
  if (!owner.grid->session->checking_proxies) return barrier;
  const FiberThread& thread = self();
  const FiberThread& initialiser = *owner.threads[barrier.initialiser];
  const std::string where = describe(barrier) + ": its initialiser, " +
                            describe_thread(initialiser.linear, initialiser.block_size);
  if (initialiser.init_fences.size() <= barrier.init_fences) {
    fail(ErrorKind::kState, site, instruction,
         where + ", has executed no fence.mbarrier_init or fence.proxy.async since");
  }
  if (&initialiser == &thread) return barrier;
  const Seen seen = thread.block->shared.clocks().seen(thread.block->shared.column(thread.warp));
  if (!seen.before(owner.shared.column(initialiser.warp),
                   initialiser.init_fences[barrier.init_fences])) {
    fail(ErrorKind::kState, site, instruction,
         where + ", has fenced with no barrier between that and this");
  }
  return barrier;
}

void complete_bytes(Block& owner, MBarrier& barrier, int64_t bytes) {
  barrier.bytes -= bytes;
  complete_if_due(owner, barrier);
}

void mbarrier_init(Site site, uint32_t address, uint32_t count) {
  const Quiet quiet;
  const char* const name = "mbarrier.init";
  FiberThread& thread = self();
  Block& block = *thread.block;
  check_count(site, name, count);
  shared(site, name, address, kBarrierBytes, kBarrierBytes, Access::kWrite);
  const uint32_t offset = address - kSharedBase;
  MBarrier& barrier = block.mbarriers[offset];
  barrier = {};
  barrier.offset = offset;
  barrier.column = block.shared.clocks().add_column();
  barrier.count = barrier.pending = count;
  barrier.initialiser = thread.linear;
  barrier.init_fences = thread.init_fences.size();
  block.shared.mark_barrier(offset, true);
}

void mbarrier_invalidate(Site site, uint32_t address) {
  const Quiet quiet;
  const char* const name = "mbarrier.inval";
  Block& owner = block_of_address(site, name, address);
  check_own(site, name, owner);
  const MBarrier& barrier = find_mbarrier(site, name, owner, address);
  if (!barrier.waiting.empty() || barrier.in_flight != 0) {
    fail(ErrorKind::kState, site, name,
         describe(barrier) + ": " + std::to_string(barrier.waiting.size()) + " threads and " +
             std::to_string(barrier.in_flight) + " copies still use it");
  }
  owner.shared.mark_barrier(barrier.offset, false);
  owner.mbarriers.erase(barrier.offset);
}

void mbarrier_init_fence(Site) {
  const Quiet quiet;
  FiberThread& thread = self();
  const SharedMemory& shared = thread.block->shared;
  thread.init_fences.push_back(shared.clocks().epoch(shared.column(thread.warp)));
}

uint64_t mbarrier_arrive(Site site, const char* instruction, uint32_t address, uint32_t count,
                         int64_t bytes, Scope scope) {
  const Quiet quiet;
  FiberThread& thread = self();
  Block& owner = block_of_address(site, instruction, address);
  MBarrier& barrier = find_mbarrier(site, instruction, owner, address);
  if (bytes != 0) add_bytes(site, instruction, barrier, bytes);
  const uint64_t state = barrier.phase;
  if (count == 0) {
    complete_if_due(owner, barrier);  // all may have come before they were expected
    return state;
  }
  check_count(site, instruction, count);
  if (count > barrier.pending) {
    fail(ErrorKind::kState, site, instruction,
         std::to_string(count) + " arrivals too many: " + describe(barrier));
  }
  SharedMemory& own = thread.block->shared;
  scope = told(owner, thread, scope);
  for (int i = static_cast<int>(scope); i < kScopes; ++i) {
    Clocks::join(barrier.clock[i], own.clocks().row(own.column(thread.warp)));
  }
  if (scope != Scope::kNowhere) tell_release(&barrier.token);
  own.clocks().advance(own.column(thread.warp));  // what comes next is not part of the arrival
  barrier.pending -= count;
  complete_if_due(owner, barrier);
  return state;
}

void mbarrier_arrive_behind_copies(Site site, const char* instruction, uint32_t address,
                                   bool increments) {
  const Quiet quiet;
  FiberThread& thread = self();
  Block& block = block_of_address(site, instruction, address);
  check_own(site, instruction, block);
  MBarrier& barrier = find_mbarrier(site, instruction, block, address);
  if (increments) {
    check_count(site, instruction, barrier.pending + 1);
    ++barrier.pending;
  }
  std::vector<PendingCopy> copies = std::move(thread.copies);
  thread.copies.clear();
  std::fill(thread.group_sizes.begin(), thread.group_sizes.end(), 0);
  thread.uncommitted = 0;
  for (const PendingCopy& copy : copies) {
    block.shared.hand_over(site, instruction, copy.to - kSharedBase,
                           static_cast<uint32_t>(copy.bytes), barrier.column, barrier.offset);
  }
  ++barrier.in_flight;
  MBarrier* const counts = &barrier;
  effect(new_effect_queue(), [=, block = &block, copies = std::move(copies)] {
    for (const PendingCopy& copy : copies) {
      const uint32_t offset = copy.to - kSharedBase;
      const auto bytes = static_cast<uint32_t>(copy.bytes);
      std::memcpy(block->shared.data() + offset, copy.data, bytes);
      block->shared.async_landed(offset, bytes, counts->column);
    }
    --counts->in_flight;
    if (counts->pending == 0) {
      fail(ErrorKind::kState, site, instruction, "1 arrivals too many: " + describe(*counts));
    }
    counts->landed_phase = counts->phase + 1;
    --counts->pending;
    complete_if_due(*block, *counts);
  });
}

void mbarrier_complete_bytes(Site site, const char* instruction, uint32_t address, int64_t bytes) {
  const Quiet quiet;
  Block& owner = block_of_address(site, instruction, address);
  MBarrier& barrier = find_mbarrier(site, instruction, owner, address);
  add_bytes(site, instruction, barrier, -bytes);
  complete_if_due(owner, barrier);
}

bool mbarrier_wait(Site site, const char* instruction, uint32_t address, AwaitedPhase phase,
                   bool sleeps, Scope scope) {
  const Quiet quiet;
  FiberThread& thread = self();
  Block& owner = block_of_address(site, instruction, address);
  check_own(site, instruction, owner);
  MBarrier& barrier = find_mbarrier(site, instruction, owner, address);
  if (phase.by_parity && phase.value > 1) {
    fail(site, instruction, "a parity of " + std::to_string(phase.value) + ": expected 0 or 1");
  }
  Grid& grid = *owner.grid;
  bool done = complete(barrier, site, instruction, phase);
  if (!done && !sleeps) {
    yield(site, instruction);
    return false;
  }
  // It may give up early, as the hardware does after a time: callers loop.
  if (!done && grid.schedule.asynchrony == Asynchrony::kRandom && grid.random.below(8) == 0) {
    yield(site, instruction);
    return false;
  }
  const uint64_t seen = barrier.phase;
  if (!done) {
    const int column = barrier.column;
    barrier.waiting.push_back(&thread);
    Wait wait{site, instruction, -1, &barrier};
    grid.suspend(thread, wait);
    // Woken by the end of the phase that it saw; a parity may name the next one again by now.
    if (find_mbarrier(site, instruction, owner, address).column != column) {
      fail(ErrorKind::kState, site, instruction,
           "another mbarrier was made there before the thread had seen the phase end");
    }
  }
  Clocks& clocks = owner.shared.clocks();
  const auto& released = barrier.released[static_cast<int>(Scope::kNowhere)];
  if (owner.cluster->blocks.size() > 1) Clocks::join(thread.async_known, released);
  barrier.observed = std::max(barrier.observed, done ? seen : seen + 1);
  if (scope == Scope::kNowhere) return true;
  clocks.learn(owner.shared.column(thread.warp), barrier.released[static_cast<int>(scope)]);
  tell_acquire(&barrier.token);
  return true;
}

}  // namespace resnet_fused::emulator
