// Threads that wait for each other: lanes of a warp, named barriers, the whole grid.
#include <bit>
#include <string>
#include <string_view>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

std::string lanes_of(uint32_t mask) {
  std::string text;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    int last = lane;
    while (last + 1 < kWarpSize && (mask >> (last + 1) & 1) != 0) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text;
}

bool same_call(Site a, const char* a_instruction, Site b, const char* b_instruction) {
  // Nearly always the very same literals, so the text is compared only where they are not.
  const auto same = [](const char* x, const char* y) { return x == y || std::string_view(x) == y; };
  return a.line == b.line && same(a_instruction, b_instruction) && same(a.file, b.file);
}

Meeting* find_meeting(Warp& warp, Site site, const char* instruction, uint32_t mask, int lane) {
  for (Meeting& meeting : warp.meetings) {
    if (meeting.mask == mask && same_call(meeting.site, meeting.instruction, site, instruction)) {
      return &meeting;
    }
    // Lanes wait for this one there, and this one is about to wait for them here.
    if ((meeting.mask >> lane & 1) != 0 && (mask & meeting.arrived) != 0) {
      fail(ErrorKind::kDivergence, site, instruction,
           "lane " + std::to_string(lane) + " comes here (mask " + hex(mask) + ") while lanes " +
               lanes_of(meeting.arrived) + " of its warp wait for it in " + meeting.instruction +
               " at " + describe(meeting.site) + " (mask " + hex(meeting.mask) + ")");
    }
  }
  return nullptr;
}

void check_mask(Warp& warp, Site site, const char* instruction, uint32_t mask, int lane) {
  if ((mask >> lane & 1) == 0) {
    fail(ErrorKind::kDivergence, site, instruction,
         "lane " + std::to_string(lane) + " is not in its own mask " + hex(mask));
  }
  if ((mask & ~warp.exists) != 0) {
    fail(ErrorKind::kDivergence, site, instruction,
         "mask " + hex(mask) + " names lanes " + lanes_of(mask & ~warp.exists) +
             ", which the block does not have");
  }
  if ((mask & warp.done) != 0) {
    fail(ErrorKind::kDivergence, site, instruction,
         "mask " + hex(mask) + " names lanes " + lanes_of(mask & warp.done) +
             ", which have left the kernel");
  }
}

// Everybody whom the barrier waited for has come. `last` came last, and runs.
void complete(Block& block, NamedBarrier& barrier, const FiberThread& last) {
  Grid& grid = *block.grid;
  Clocks& clocks = block.shared.clocks();
  ++grid.progress;
  uint32_t warps = 0;
  for (FiberThread* thread : barrier.waiting) {
    if ((warps >> thread->warp & 1) == 0) {
      warps |= 1u << thread->warp;
      clocks.learn(block.shared.column(thread->warp), barrier.clock);
      clocks.advance(block.shared.column(thread->warp));
      block.warps[thread->warp].requests.flush();
    }
    block.warps[thread->warp].at_barrier &= ~(1u << thread->lane);
    if (thread != &last) grid.make_ready(block, thread->warp, 1u << thread->lane);
  }
  ++barrier.phase;
  barrier.expected = 0;
  barrier.arrived = 0;
  barrier.whole_block = false;
  barrier.waiting.clear();
  barrier.clock.clear();
}

void check_barrier(Site site, const char* instruction, const Block& block, int id, int threads) {
  if (id < 0 || id >= kBarriers) {
    fail(site, instruction, "barrier " + std::to_string(id) + ": expected 0 to 15");
  }
  if (threads < 0 || threads % kWarpSize != 0) {
    fail(site, instruction,
         std::to_string(threads) + " threads: expected a multiple of " + std::to_string(kWarpSize));
  }
  if (threads > static_cast<int>(block.threads.size())) {
    fail(site, instruction,
         std::to_string(threads) + " threads: the block has " +
             std::to_string(block.threads.size()));
  }
}

// The barrier's phase begins, or the new arrival agrees with the ones before it.
void join_phase(Site site, const char* instruction, const Block& block, int id,
                NamedBarrier& barrier, int threads) {
  const bool whole_block = threads == 0;
  const int expected = whole_block ? block.alive : threads;
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.whole_block = whole_block;
    barrier.first_site = site;
    return;
  }
  if (barrier.expected != expected) {
    fail(site, instruction,
         "barrier " + std::to_string(id) + " for " + std::to_string(expected) +
             " threads, but others arrived at " + describe(barrier.first_site) + " for " +
             std::to_string(barrier.expected));
  }
}

}  // namespace

void collective_erased(Site site, const char* instruction, uint32_t mask, void* argument,
                       void (*run)(void* context, void** arguments), void* context) {
  const Quiet quiet;
  FiberThread& thread = self();
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp];
  Meeting* meeting = find_meeting(warp, site, instruction, mask, thread.lane);
  if (meeting == nullptr) {
    check_mask(warp, site, instruction, mask, thread.lane);
    meeting = &warp.meetings.emplace_back(Meeting{site, instruction, mask, 0, {}});
  }
  meeting->arguments[thread.lane] = argument;
  meeting->arrived |= 1u << thread.lane;
  if (meeting->arrived != mask) {
    block.grid->suspend(thread, {site, instruction, -1});
    return;
  }
  ++block.grid->progress;
  run(context, meeting->arguments);
  if (mask == warp.exists) warp.requests.flush();
  const uint32_t others = mask & ~(1u << thread.lane);
  if (others != 0) block.grid->make_ready(block, thread.warp, others);
  warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
}

void warp_barrier(Site site, uint32_t mask) {
  FiberThread& thread = self();
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp];
  const void* token = &warp.tokens[warp.phase & 1];
  tell_release(token);
  collective(site, "bar.warp.sync", mask, nullptr, [&](void**) {
    block.shared.clocks().advance(block.shared.column(thread.warp));
    ++warp.phase;
  });
  tell_acquire(token);
}

void barrier(Site site, int id, int threads, bool wait) {
  const Quiet quiet;
  const char* instruction = wait ? "bar.sync" : "bar.arrive";
  FiberThread& thread = self();
  Block& block = *thread.block;
  check_barrier(site, instruction, block, id, threads);
  Warp& warp = block.warps[thread.warp];
  NamedBarrier& barrier = block.barriers[id];
  for (int lane = 0; wait && lane < kWarpSize; ++lane) {
    if ((warp.at_barrier >> lane & 1) == 0) continue;
    const Wait& other = block.threads[thread.warp * kWarpSize + lane]->wait;
    if (other.barrier != id || !same_call(other.site, other.instruction, site, instruction)) {
      fail(ErrorKind::kDivergence, site, instruction,
           "lane " + std::to_string(thread.lane) + " comes to barrier " + std::to_string(id) +
               " while lanes " + lanes_of(warp.at_barrier) + " of its warp wait at barrier " +
               std::to_string(other.barrier) + ", " + describe(other.site));
    }
    break;  // the lanes that wait have been compared with each other when they came
  }
  join_phase(site, instruction, block, id, barrier, threads);
  const void* token = &barrier.tokens[barrier.phase & 1];
  tell_release(token);
  Clocks::join(barrier.clock, block.shared.clocks().row(block.shared.column(thread.warp)));
  settle_some(thread);
  ++barrier.arrived;
  if (wait) {
    barrier.waiting.push_back(&thread);
    warp.at_barrier |= 1u << thread.lane;
  } else {
    block.shared.clocks().advance(
        block.shared.column(thread.warp));  // what the thread does next is not part of the arrival
  }
  if (barrier.arrived == barrier.expected) {
    complete(block, barrier, thread);
  } else if (wait) {
    block.grid->suspend(thread, {site, instruction, id});
  }
  if (wait) tell_acquire(token);
}

void grid_barrier(Site site) {
  const Quiet quiet;
  FiberThread& thread = self();
  Grid& grid = *thread.block->grid;
  if (!grid.cooperative) fail(site, "grid barrier", "the launch is not cooperative");
  const void* token = &grid.tokens[grid.phase & 1];
  tell_release(token);
  grid.at_grid_barrier.push_back(&thread);
  if (static_cast<int>(grid.at_grid_barrier.size()) < grid.alive) {
    grid.suspend(thread, {site, "grid barrier", -1});
  } else {
    grid.complete_grid_barrier(thread);
  }
  tell_acquire(token);
}

void Grid::complete_grid_barrier(const FiberThread& last) {
  ++progress;
  ++phase;
  for (const auto& block : blocks) {
    if (block->rank == 0) block->shared.clocks().everybody_meets();  // a cluster has one set
    for (Warp& warp : block->warps) warp.requests.flush();
  }
  for (const FiberThread* thread : at_grid_barrier) {
    if (thread != &last) make_ready(*thread->block, thread->warp, 1u << thread->lane);
  }
  at_grid_barrier.clear();
}

void thread_left(FiberThread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp];
  for (const Meeting& meeting : warp.meetings) {
    if ((meeting.mask >> thread.lane & 1) == 0) continue;
    fail(ErrorKind::kDivergence, meeting.site, meeting.instruction,
         "lane " + std::to_string(thread.lane) + " leaves the kernel while lanes " +
             lanes_of(meeting.arrived) + " of its warp wait for it");
  }
  products_left(thread);
  warp.done |= 1u << thread.lane;
  --block.alive;
  --block.grid->alive;
  ++block.grid->progress;
  // Barriers of the whole block wait for those who are left.
  for (NamedBarrier& barrier : block.barriers) {
    if (!barrier.whole_block || barrier.arrived == 0) continue;
    --barrier.expected;
    if (barrier.arrived == barrier.expected) complete(block, barrier, thread);
  }
  block.cluster->thread_left(thread);
  if (block.alive == 0) check_block_end(block);
  Grid& grid = *block.grid;
  if (grid.alive > 0 && static_cast<int>(grid.at_grid_barrier.size()) == grid.alive) {
    grid.complete_grid_barrier(thread);
  }
}

}  // namespace resnet_fused::emulator
