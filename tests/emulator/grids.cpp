// Blocks that meet in one launch: csrc/device/grid_barrier.h, and what goes wrong around it. Marks
// as in hazards.cpp.
#include "../../csrc/device/grid_barrier.h"

#include "probes.h"

namespace resnet_fused::probes {
namespace {

constexpr int kThreads = 64;
constexpr int kTurns = 3;

enum class Slip {
  kNone,
  kNoRelease,    // the arrival orders nothing
  kNoBlockMeet,  // the arrival does not wait for the block's other warps
  kNoWait,
  kSkipped,  // by one block, once
  kTooFew,   // arrivals that a meeting expects
  kTooMany,
  kReadOnlyPath,
};

// Blocks hand each other their words, turn by turn: out[256 ..] is what each block says, in the
// place of the turn before last, out[1024 ..] what it has heard last. out[0] counts arrivals.
void meetings(const Memory& memory, Slip slip) {
  const auto blocks = gridDim.x;
  const uint32_t expected = slip == Slip::kTooFew    ? blocks - 1
                            : slip == Slip::kTooMany ? blocks + 1
                                                     : blocks;
  GridBarrier barrier(memory.out, expected);
  const auto id = blockIdx.x * kThreads + static_cast<uint32_t>(thread());
  const auto other = (blockIdx.x + 1) % blocks * kThreads + (static_cast<uint32_t>(thread()) ^ 32u);
  uint32_t heard = 0;
  for (uint32_t turn = 0; turn < kTurns; ++turn) {
    uint32_t* said = memory.out + 256 + turn % 2 * 256;
    ptx::store_global(said + id, heard + id + 1);  // <- said
    const bool skips = slip == Slip::kSkipped && blockIdx.x == 1 && turn == 1;
    if (!skips && slip == Slip::kNoRelease) {
      ptx::sync_threads();
      if (thread() == 0) ptx::atomic_add(memory.out, 1u);
      while (thread() == 0 && ptx::load_acquire(memory.out) < (turn + 1) * blocks) {
      }
      ptx::sync_threads();
    } else if (!skips && slip == Slip::kNoBlockMeet) {
      if (thread() == 0) ptx::reduce_add_release(memory.out, 1u);
      while (thread() == 0 && ptx::load_acquire(memory.out) < (turn + 1) * blocks) {
      }
      ptx::sync_threads();
    } else if (!skips) {
      barrier.arrive();
      if (slip != Slip::kNoWait) barrier.wait();  // <- the meeting
    }
    if (slip == Slip::kReadOnlyPath) {
      heard = ptx::load_global_read_only(said + other);  // <- heard by the read-only path
    } else {
      heard = ptx::load_global(said + other);  // <- heard
    }
  }
  ptx::store_global(memory.out + 1024 + id, heard);
  barrier.leave(kVectorBytes);  // <- leaves
}

// One thread in each of three blocks. Block 0 leaves a word and says so; what block 2 hears comes
// from block 1, which has seen that block 0 said so and has acquired nothing.
void second_hand(const Memory& memory) {
  uint32_t* flag = memory.out;
  if (blockIdx.x == 0) {
    ptx::store_global(memory.out + 64, 7u);
    ptx::store_release(flag, 1u);
  } else if (blockIdx.x == 1) {
    while (ptx::atomic_add(flag, 0u) < 1) {
    }
    ptx::store_release(flag, 2u);
  } else {
    while (ptx::atomic_add(flag, 0u) < 2) {
    }
    ptx::load_acquire(flag);
    ptx::store_global(memory.out + 65, ptx::load_global(memory.out + 64));  // <- second hand
  }
}

// Block 0 says by a relaxed addition what it has written, before its fence or behind it.
void fenced(const Memory& memory, bool behind) {
  if (blockIdx.x == 0) {
    if (behind) ptx::fence_acq_rel_gpu();
    ptx::store_global(memory.out + 64, 7u);
    if (!behind) ptx::fence_acq_rel_gpu();
    ptx::atomic_add(memory.out, 1u);
  } else {
    while (ptx::load_acquire(memory.out) < 1) {
    }
    ptx::store_global(memory.out + 65, ptx::load_global(memory.out + 64));  // <- behind the fence
  }
}

enum class Ticket {
  kAcquireRelease,
  kFences,      // of who draws it, around the addition
  kEarlyFence,  // of each thread, ahead of the barrier: it releases that thread's words alone
  kNoOrder,
  kNoBlockMeet,
};

// Blocks of a plain launch leave their words, and the last one to arrive takes what all have left:
// out[1024 ..]. out[0] counts arrivals.
void ticket(const Memory& memory, Ticket kind) {
  const auto id = static_cast<uint32_t>(thread());
  ptx::store_global(memory.out + 256 + blockIdx.x * kThreads + id, id + 1);
  if (kind == Ticket::kEarlyFence) ptx::fence_acq_rel_gpu();
  if (kind != Ticket::kNoBlockMeet) ptx::sync_threads();
  if (thread() == 0) {
    const bool orders = kind == Ticket::kAcquireRelease || kind == Ticket::kNoBlockMeet;
    if (kind == Ticket::kFences) ptx::fence_acq_rel_gpu();
    ptx::store_shared(
        base(), orders ? ptx::atomic_add_acq_rel(memory.out, 1u) : ptx::atomic_add(memory.out, 1u));
    if (kind == Ticket::kFences) ptx::fence_acq_rel_gpu();
  }
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(base()) + 1 != gridDim.x) return;
  uint32_t sum = 0;
  for (uint32_t block = 0; block < gridDim.x; ++block) {
    sum += ptx::load_global(memory.out + 256 + block * kThreads + id);  // <- taken by the last
  }
  ptx::store_global(memory.out + 1024 + id, sum);
}

// Block 0 copies a word to shared memory, which block 1 writes after they have met. With `landed`
// block 0 has waited for its copy by then.
void copied(const Memory& memory, bool landed) {
  GridBarrier barrier(memory.out, gridDim.x);
  if (blockIdx.x == 0) {
    ptx::cp_async<16>(base(), memory.out + 64, true);  // <- under way
    if (landed) ptx::cp_async_wait_all();
  }
  barrier.arrive();
  barrier.wait();
  if (blockIdx.x == 0) {
    ptx::cp_async_wait_all();
  } else {
    ptx::store_global(memory.out + 64, 7u);  // <- written under a copy
  }
}

}  // namespace

void add_grids(Table& t) {
  const std::pair<const char*, Slip> slips[] = {
      {"meetings", Slip::kNone},
      {"meetings_no_release", Slip::kNoRelease},
      {"meetings_no_block_meet", Slip::kNoBlockMeet},
      {"meetings_no_wait", Slip::kNoWait},
      {"meetings_skipped", Slip::kSkipped},
      {"meetings_too_few", Slip::kTooFew},
      {"meetings_too_many", Slip::kTooMany},
      {"meetings_read_only_path", Slip::kReadOnlyPath},
  };
  for (const auto& [name, slip] : slips) {
    t[name] = {4, kThreads, 0, true, [slip](const Memory& m) { meetings(m, slip); }};
  }
  t["second_hand"] = {3, 1, 0, true, second_hand};
  for (const bool right : {false, true}) {
    const std::string name = right ? "_right" : "";
    t["fenced" + name] = {2, 1, 0, true, [right](const Memory& m) { fenced(m, !right); }};
    t["copied" + name] = {2, 1, 16, true, [right](const Memory& m) { copied(m, right); }};
  }
  const std::pair<const char*, Ticket> tickets[] = {
      {"ticket", Ticket::kAcquireRelease},
      {"ticket_fences", Ticket::kFences},
      {"ticket_early_fence", Ticket::kEarlyFence},
      {"ticket_no_order", Ticket::kNoOrder},
      {"ticket_no_block_meet", Ticket::kNoBlockMeet},
  };
  for (const auto& [name, kind] : tickets) {
    t[name] = {4, kThreads, 16, false, [kind](const Memory& m) { ticket(m, kind); }};
  }
  // Blocks that are not all there at once.
  t["meetings_plain"] = {4, kThreads, 0, false, [](const Memory& m) { meetings(m, Slip::kNone); }};
}

}  // namespace resnet_fused::probes
