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
  barrier.leave();  // <- leaves
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
  // Blocks that are not all there at once.
  t["meetings_plain"] = {4, kThreads, 0, false, [](const Memory& m) { meetings(m, Slip::kNone); }};
}

}  // namespace resnet_fused::probes
