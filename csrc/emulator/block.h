// The scheduler's side of a grid: fibers, warps, barriers, and who waits for what.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "async_proxy.h"
#include "cluster.h"
#include "effects.h"
#include "fiber.h"
#include "global_order.h"
#include "mbarrier.h"
#include "requests.h"
#include "runtime.h"
#include "shared_memory.h"

namespace resnet_fused::emulator {

constexpr int kBarriers = 16;  // PTX ISA, bar: "sixteen barriers in each CTA"

struct Block;
struct Grid;
struct Warpgroup;  // warpgroup_state.h

// What a thread waits for; only read for messages.
struct Wait {
  Site site = {"", 0};
  const char* instruction = "";
  int barrier = -1;  // which named barrier, or -1
  const MBarrier* mbarrier = nullptr;
};

struct PendingCopy {
  uint32_t to;
  int bytes;
  bool effective;  // the destination holds the data; the group has not been waited for
  Site site;
  uint8_t data[16];
  const void* from;
  uint32_t valid_bytes;  // that are read; the others are zeros
};

// An asynchronous copy has landed: until now it may have read from there.
void read_until_now(Site site, const char* instruction, const void* from, uint32_t bytes);

// A bulk store of a thread: the read of its source, and its two effects.
struct BulkStore {
  AsyncRead read;
  uint64_t reads;   // the effect that reads shared memory
  uint64_t writes;  // the effect that writes global memory
  bool waited = false;
};

struct FiberThread : Thread {
  Fiber fiber;
  Block* block = nullptr;
  Wait wait;
  std::vector<PendingCopy> copies;         // issued and not waited for, oldest first
  std::vector<uint32_t> group_sizes;       // of the committed groups among them, oldest first
  uint32_t uncommitted = 0;                // copies at the end that belong to no group yet
  const void* polled = nullptr;            // the last atomic load's address
  uint32_t polls = 0;                      // loads of it in a row
  std::vector<const void*> relaxed_loads;  // that a later fence makes acquire loads
  bool fenced = false;
  std::vector<uint32_t> known_at_fence;  // by its warp, of a cooperative grid's
  bool waited = false;                   // for the launch ahead
  std::vector<uint32_t> proxy_fences;    // the warp's epoch at each fence.proxy.async
  std::vector<uint32_t> init_fences;     // and at each of those and of fence.mbarrier_init
  std::vector<std::vector<BulkStore>> bulk_groups;  // committed, oldest first
  std::vector<BulkStore> bulk_open;                 // in no group yet
  std::vector<uint32_t> async_known;  // beside the warp's row: of what is asynchronous alone
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;
};

// Lanes of a warp that wait for each other.
struct Meeting {
  Site site;
  const char* instruction;
  uint32_t mask;
  uint32_t arrived;
  void* arguments[kWarpSize];
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  uint32_t exists = 0;
  uint32_t done = 0;
  uint32_t at_barrier = 0;  // lanes that wait in bar.sync
  std::vector<Meeting> meetings;
  WarpRequests requests;
  uint32_t phase = 0;  // of bar.warp.sync
  char tokens[2];      // ThreadSanitizer's, of even and odd phases
};

struct NamedBarrier {
  int expected = 0;  // 0: no phase has begun
  bool whole_block = false;
  int arrived = 0;
  Site first_site = {"", 0};
  std::vector<FiberThread*> waiting;
  std::vector<uint32_t> clock;  // what the arrivals so far make visible
  uint32_t phase = 0;
  char tokens[2];  // ThreadSanitizer's, of even and odd phases: a fast thread is one phase ahead
};

// A block of the grid; a plain launch uses one for all blocks in turn, but under ThreadSanitizer.
struct Block {
  Grid* grid = nullptr;
  uint64_t linear = 0;
  std::vector<std::unique_ptr<FiberThread>> threads;
  std::vector<Warp> warps;
  std::array<NamedBarrier, kBarriers> barriers;
  SharedMemory shared;
  std::vector<std::shared_ptr<Warpgroup>> warpgroups;  // null until they have a product
  std::map<uint32_t, MBarrier> mbarriers;              // by offset
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  int alive = 0;
  int first_warp = 0;  // number of warps 0 in the grid's list
};

// A launch in progress.
struct Grid {
  dim3 size;
  dim3 block_size;
  dim3 cluster_size;
  bool cooperative = false;
  bool early = false;  // the launch ahead may still run
  const std::function<void()>* kernel = nullptr;
  Session* session = nullptr;
  Schedule schedule;
  Random random{0};
  Fiber main;
  std::exception_ptr error;

  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Warp*> warps;           // of all resident blocks
  std::vector<FiberThread*> lanes;    // lane l of warp w at 32 w + l; null where there is none
  std::vector<uint64_t> ready_warps;  // one bit a warp
  int current_warp = 0;
  int alive = 0;
  std::vector<FiberThread*> spinning;
  uint64_t progress = 0;  // stores, meetings, exits: what can end somebody's spinning
  uint64_t progress_seen = 0;
  int idle_rounds = 0;
  Effects effects;  // of asynchronous instructions, yet to happen
  std::vector<FiberThread*> at_grid_barrier;
  uint32_t phase = 0;                  // of the grid barrier
  char tokens[2];                      // ThreadSanitizer's, of even and odd phases
  std::unique_ptr<GlobalOrder> order;  // of a launch whose blocks' races are looked for

  void make_ready(const Block& block, int warp, uint32_t lanes);
  int pick_warp();      // -1: none
  FiberThread* pick();  // null: nobody can run
  // Stops the running thread until somebody makes it ready.
  void suspend(FiberThread& self, Wait wait);
  // Where to go when a thread has left: to the next one, or out of the launch.
  Fiber& next_after_exit();
  void settle_effects();  // kRandom: some of them happen
  void complete_grid_barrier(const FiberThread& last);
  std::string who_waits() const;
  Wait first_wait() const;  // of a thread that has not left; there is one
};

extern thread_local Grid* running_grid __attribute__((tls_model("initial-exec")));

inline FiberThread& self() { return static_cast<FiberThread&>(this_thread()); }

// Copies in flight (asynchrony.cpp).
void settle_some(FiberThread& thread);  // kRandom: some of the thread's copies take effect

// The running thread touches global memory (memory.cpp): throws where there is none, or where the
// launch ahead may still use it.
void check_global(Site site, const char* instruction, const void* address, uint32_t bytes,
                  Access access);

// Products of warpgroups (warpgroup.cpp): a thread leaves the kernel.
void products_left(const FiberThread& thread);

// Barriers and warps (meetings.cpp).
void thread_left(FiberThread& thread);
// The last thread of a block has left: nothing asynchronous may be under way (tma.cpp).
void check_block_end(Block& block);

}  // namespace resnet_fused::emulator
