// mbarriers: barriers in shared memory that count arrivals and bytes, in phases (PTX ISA, Parallel
// Synchronization and Communication Instructions, mbarrier).
#pragma once

#include <cstdint>
#include <vector>

#include "errors.h"

namespace resnet_fused::emulator {

struct Block;
struct FiberThread;

constexpr uint32_t kBarrierBytes = 8;
constexpr int64_t kMostPending = (1 << 20) - 1;  // arrivals, and bytes either way

// How far an arrival tells what its thread has read and written, and how far a wait learns that:
// in their block, in the cluster, or (relaxed) nowhere. Whoever has waited at any scope may ask for
// copies over what asynchronous instructions have written or read, where those who arrived had
// waited for that.
enum class Scope { kBlock, kCluster, kNowhere };
constexpr int kScopes = 3;

// ---- For the wrappers. Addresses are shared addresses, of another block through cluster_address.

void mbarrier_init(Site site, uint32_t address, uint32_t count);
void mbarrier_invalidate(Site site, uint32_t address);
// fence.mbarrier_init: what this thread has initialised may be used by asynchronous instructions.
void mbarrier_init_fence(Site site);
// Expects `bytes` more in this phase, then arrives `count` times (0: only expects). Returns the
// state that names the phase.
uint64_t mbarrier_arrive(Site site, const char* instruction, uint32_t address, uint32_t count,
                         int64_t bytes, Scope scope = Scope::kBlock);
void mbarrier_complete_bytes(Site site, const char* instruction, uint32_t address, int64_t bytes);

// cp.async.mbarrier.arrive: arrives once when all copies (cp.async) that the thread has in flight
// have landed; from here on the phase, not a group, is what one waits for to read them.
// `increments`: the phase waits for that arrival beyond its count.
void mbarrier_arrive_behind_copies(Site site, const char* instruction, uint32_t address,
                                   bool increments);

// Which phase a thread waits for: the one with this parity, or the one that a state names.
struct AwaitedPhase {
  bool by_parity;
  uint64_t value;
};
// Whether that phase is complete; what happened before it is then seen by the thread. `sleeps`: the
// thread sleeps until it is (try_wait), or looks and lets others run (test_wait).
bool mbarrier_wait(Site site, const char* instruction, uint32_t address, AwaitedPhase phase,
                   bool sleeps, Scope scope = Scope::kBlock);

// ---- For the runtime.

struct MBarrier {
  uint32_t offset = 0;
  int column = 0;             // of the clocks: its epochs are the phases
  uint32_t count = 0;         // arrivals a phase
  uint32_t pending = 0;       // arrivals that are missing in this one
  int64_t bytes = 0;          // that are missing in this one; below 0 more have come than expected
  uint64_t phase = 0;         // phases that are complete
  uint64_t observed = 0;      // of them, those that somebody has waited for
  uint32_t in_flight = 0;     // copies that will complete here
  uint64_t landed_phase = 0;  // of the last copy that did, + 1
  int initialiser = 0;        // thread
  size_t init_fences = 0;     // that it had executed before
  std::vector<uint32_t> clock[kScopes];     // what this phase's arrivals make visible to waits
  std::vector<uint32_t> released[kScopes];  // what the complete phases do
  std::vector<FiberThread*> waiting;
  char token = 0;  // ThreadSanitizer's
};

// The block that a shared address of this cluster belongs to; the address becomes its own.
Block& block_of_address(Site site, const char* instruction, uint32_t& address);
// The mbarrier there; throws unless it is one, initialised before what the thread does.
MBarrier& find_mbarrier(Site site, const char* instruction, Block& owner, uint32_t address);
// ... and may complete a copy: its initialiser has fenced, ordered before the thread.
MBarrier& find_copy_barrier(Site site, const char* instruction, Block& owner, uint32_t address);
void complete_bytes(Block& owner, MBarrier& barrier, int64_t bytes);
// "mbarrier at byte 64, phase 3 (parity 1): 1 of 2 arrivals and 128 bytes missing"
std::string describe(const MBarrier& barrier);

}  // namespace resnet_fused::emulator
