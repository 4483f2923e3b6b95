// Kernels with one mistake each, beside the same kernel without it where that says more. The tests
// find the line that an error must name by the mark behind it: "<- name".
#include "probes.h"

namespace resnet_fused::probes {
namespace {

using ptx::SharedAddress;

// Each thread copies 16 bytes and reads those of the thread half a block away.
void copy_and_read(const Memory& memory, bool wait, bool meet) {
  const int other = (thread() + 32) % 64;
  ptx::cp_async<16>(base() + 16 * thread(), memory.in + 4 * thread(), true);  // <- the copy
  ptx::cp_async_commit_group();
  if (wait) ptx::cp_async_wait_group<0>();
  if (meet) ptx::sync_threads();
  const uint32_t value = ptx::load_shared<uint32_t>(base() + 16 * other);  // <- the copy's reader
  ptx::store_global(memory.out + thread(), value);
}

// Two groups in flight, of which the first is needed.
void two_groups(const Memory& memory, bool enough) {
  ptx::cp_async<4>(base() + 8 * thread(), memory.in + thread(), true);
  ptx::cp_async_commit_group();
  ptx::cp_async<4>(base() + 8 * thread() + 4, memory.in + 64 + thread(), true);
  ptx::cp_async_commit_group();
  if (enough) {
    ptx::cp_async_wait_group<1>();
  } else {
    ptx::cp_async_wait_group<2>();
  }
  const auto value = ptx::load_shared<uint32_t>(base() + 8 * thread());  // <- two_groups
  ptx::store_global(memory.out + thread(), value);
  ptx::cp_async_wait_all();
}

// A ring with one slot: its last reader must have come to a barrier before the next write.
void overwrite(const Memory& memory, bool meet) {
  for (int i = 0; i < 2; ++i) {
    const auto value = static_cast<uint32_t>(i + thread());
    ptx::store_shared<uint32_t>(base() + 4 * thread(), value);  // <- overwrite
    ptx::sync_threads();
    const int other = (thread() + 32) % 64;
    ptx::store_global(memory.out + 64 * i + thread(),
                      ptx::load_shared<uint32_t>(base() + 4 * other));
    if (meet) ptx::sync_threads();
  }
}

void within_warp(const Memory& memory, bool meet) {
  ptx::store_shared<uint32_t>(base() + 4 * thread(), 7 + thread());
  if (meet) ptx::sync_warp();
  const int other = (thread() + 1) % 32;
  const auto value = ptx::load_shared<uint32_t>(base() + 4 * other);  // <- within_warp
  ptx::store_global(memory.out + thread(), value);
}

// Warp 0 produces; warp 1 waits for it at barrier 1, at which warp 0 only arrives.
void producer(const Memory& memory, bool late) {
  if (thread() < 32) {
    ptx::store_shared<uint32_t>(base() + 4 * thread(), 9);
    ptx::barrier_arrive(1, 64);
    if (late) ptx::store_shared<uint32_t>(base() + 4 * thread(), 10);  // <- producer_late
  } else {
    ptx::barrier_sync(1, 64);
    const SharedAddress from = base() + 4 * (thread() - 32);
    const auto value = ptx::load_shared<uint32_t>(from);  // <- producer_late's reader
    ptx::store_global(memory.out + thread(), value);
  }
}

// Every thread of the grid writes, then reads what the block before it wrote.
void grid_exchange(const Memory& memory, bool meet) {
  const int id = static_cast<int>(blockIdx.x) * 64 + thread();
  ptx::store_global(memory.out + id, static_cast<uint32_t>(id + 1));
  if (meet) emulator::grid_barrier(emulator::Site::here());
  const int other = (id + 192) % 256;
  ptx::store_global(memory.out + 1024 + id, ptx::load_global(memory.out + other));
}

// The last block to come adds up what all wrote.
void last_block(const Memory& memory) {
  ptx::store_global(memory.out + 1 + blockIdx.x, blockIdx.x + 10);
  if (ptx::atomic_add_acq_rel(memory.out, 1) != gridDim.x - 1) return;  // <- last_block
  uint32_t sum = 0;
  for (uint32_t i = 0; i < gridDim.x; ++i) sum += ptx::load_global(memory.out + 1 + i);
  ptx::store_global(memory.out + 1000, sum);
}

void wait_for_flag(const Memory& memory, bool raise) {
  if (blockIdx.x == 0) {
    while (ptx::load_acquire(memory.out) == 0) {  // <- wait_for_flag
    }
    ptx::store_global(memory.out + 1, 5u);
  } else if (raise) {
    ptx::store_release(memory.out, 1u);
  }
}

Probe block(uint32_t threads, uint32_t shared_bytes, std::function<void(const Memory&)> kernel) {
  return {1, threads, shared_bytes, false, std::move(kernel)};
}

void add_shared(Table& t) {
  t["copy"] = block(64, 1024, [](const Memory& m) { copy_and_read(m, true, true); });
  t["copy_no_wait"] = block(64, 1024, [](const Memory& m) { copy_and_read(m, false, true); });
  t["copy_no_barrier"] = block(64, 1024, [](const Memory& m) { copy_and_read(m, true, false); });
  t["two_groups"] = block(64, 512, [](const Memory& m) { two_groups(m, true); });
  t["two_groups_one_short"] = block(64, 512, [](const Memory& m) { two_groups(m, false); });
  t["overwrite"] = block(64, 256, [](const Memory& m) { overwrite(m, true); });
  t["overwrite_no_barrier"] = block(64, 256, [](const Memory& m) { overwrite(m, false); });
  t["within_warp"] = block(32, 128, [](const Memory& m) { within_warp(m, true); });
  t["within_warp_no_sync"] = block(32, 128, [](const Memory& m) { within_warp(m, false); });
  t["producer"] = block(64, 128, [](const Memory& m) { producer(m, false); });
  t["producer_late"] = block(64, 128, [](const Memory& m) { producer(m, true); });
  t["two_writers"] = block(64, 128, [](const Memory&) {
    ptx::store_shared<uint32_t>(base() + 4 * (thread() % 32), 1);  // <- two_writers
  });
  t["neighbouring_bytes"] = block(64, 128, [](const Memory&) {
    ptx::store_shared<uint8_t>(base() + static_cast<uint32_t>(thread()), 1);
  });
  t["neighbouring_reads"] = block(64, 128, [](const Memory& m) {
    // The two warps share words, but no byte: one reads the even halves, one writes the odd ones.
    if (thread() < 32) ptx::store_shared<uint16_t>(base() + 4 * thread(), 3);
    ptx::sync_threads();
    const uint32_t at = base() + 4 * static_cast<uint32_t>(thread() % 32);
    if (thread() < 32) m.out[thread()] = ptx::load_shared<uint16_t>(at);
    if (thread() >= 32) ptx::store_shared<uint16_t>(at + 2, 4);
  });
  t["unwritten"] = block(32, 128, [](const Memory& m) {
    m.out[0] = ptx::load_shared<uint32_t>(base() + 64);  // <- unwritten
  });
  t["out_of_bounds"] = block(32, 128, [](const Memory&) {
    ptx::store_shared<uint32_t>(base() + 4 + 4 * thread(), 1);  // <- out_of_bounds
  });
  t["offset_for_address"] = block(32, 128, [](const Memory&) {
    ptx::store_shared<uint32_t>(0, 1);  // <- offset_for_address
  });
  t["misaligned"] = block(32, 256, [](const Memory&) {
    ptx::store_shared<uint32_t>(base() + 2 + 4 * thread(), 1);  // <- misaligned
  });
  t["misaligned_global"] = block(32, 256, [](const Memory& m) {
    const auto* odd = reinterpret_cast<const char*>(m.in) + 8;
    ptx::cp_async<16>(base(), odd, true);  // <- misaligned_global
  });
  t["null"] = block(32, 0, [](const Memory& m) {
    // A number that the compiler can't know, or it would warn.
    const auto* nothing = reinterpret_cast<const uint32_t*>(static_cast<uintptr_t>(m.out[0]));
    ptx::load_global(nothing);  // <- null
  });
}

void add_meetings(Table& t) {
  t["divergent"] = block(32, 0, [](const Memory& m) {
    if (thread() < 16) {
      m.out[0] = ptx::shuffle_xor(emulator::kFullMask, 1u, 1);  // <- divergent, one side
    } else {
      m.out[1] = ptx::ballot(emulator::kFullMask, true);  // <- divergent, the other
    }
  });
  t["half_masks"] = block(32, 0, [](const Memory& m) {
    if (thread() < 16) {
      m.out[thread()] = ptx::shuffle_xor(0xFFFFu, static_cast<uint32_t>(thread()), 1);
    } else {
      m.out[thread()] = ptx::ballot(0xFFFF0000u, true);
    }
  });
  t["leaves_early"] = block(32, 0, [](const Memory&) {
    if (thread() == 5) return;
    ptx::sync_warp();  // <- leaves_early
  });
  t["outside_its_mask"] = block(32, 0, [](const Memory&) {
    ptx::sync_warp(0xFFu);  // <- outside_its_mask
  });
  t["lane_that_is_not_there"] = block(20, 0, [](const Memory&) {
    ptx::sync_warp();  // <- lane_that_is_not_there
  });
  t["crossed_barriers"] = block(64, 0, [](const Memory&) {
    ptx::barrier_sync(thread() < 32 ? 1 : 2, 64);  // <- crossed_barriers
  });
  t["barrier_in_one_warp"] = block(64, 0, [](const Memory&) {
    if (thread() < 32) ptx::barrier_sync(3, 64);  // <- barrier_in_one_warp
  });
  t["two_counts"] = block(96, 0, [](const Memory&) {
    ptx::barrier_sync(1, thread() < 32 ? 64 : 96);  // <- two_counts
  });
  t["odd_count"] = block(64, 0, [](const Memory&) {
    ptx::barrier_sync(1, 48);  // <- odd_count
  });
  t["barrier_16"] = block(64, 0, [](const Memory&) {
    ptx::barrier_sync(16, 64);  // <- barrier_16
  });
  t["split_warp"] = block(64, 0, [](const Memory&) {
    ptx::barrier_sync(thread() % 2 == 0 ? 1 : 2, 64);  // <- split_warp
  });
  t["early_exit"] = block(64, 0, [](const Memory& m) {
    if (thread() >= 32) return;  // bar.sync 0 waits for those that are left
    ptx::sync_threads();
    m.out[thread()] = 1;
  });
  t["grid"] = {4, 64, 0, true, [](const Memory& m) { grid_exchange(m, true); }};
  t["grid_no_barrier"] = {4, 64, 0, true, [](const Memory& m) { grid_exchange(m, false); }};
  t["grid_not_cooperative"] = {4, 64, 0, false, [](const Memory& m) { grid_exchange(m, true); }};
  t["last_block"] = {8, 1, 0, false, last_block};
  t["flag"] = {2, 1, 0, true, [](const Memory& m) { wait_for_flag(m, true); }};
  t["flag_never"] = {2, 1, 0, true, [](const Memory& m) { wait_for_flag(m, false); }};
  t["nobody"] = {1, 2048, 0, false, [](const Memory&) {}};
  t["greedy"] = {1, 32, 228 * 1024, false, [](const Memory&) {}};
}

}  // namespace

void add_hazards(Table& table) {
  add_shared(table);
  add_meetings(table);
}

}  // namespace resnet_fused::probes
