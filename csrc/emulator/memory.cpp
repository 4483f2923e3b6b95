// Accesses of the running thread to shared and global memory: what is checked, what is counted.
#include <cstring>
#include <string>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

// Nothing is mapped there; a null pointer with an offset would be a signal without a line.
constexpr uintptr_t kLowestAddress = 65536;
// Atomic loads of one address in a row after which a thread counts as waiting for it.
constexpr uint32_t kPolls = 4;

constexpr const char* kReadOnly = "ld.global.nc";

// An early launch: before its wait what it may read, and that it may not write; all along what it
// may read by the path for memory that nobody writes while the kernel runs (PTX ISA, ld.global.nc),
// which may find what lay there when the launch began.
void check_early(Site site, const char* instruction, const void* address, uint32_t bytes,
                 Access access) {
  const FiberThread& thread = self();
  const Grid& grid = *thread.block->grid;
  if (!grid.early) return;
  if (std::strcmp(instruction, kReadOnly) == 0 && !grid.session->is_constant(address, bytes)) {
    fail(ErrorKind::kRace, site, instruction,
         "the launch ahead may write there while this one runs: not by the read-only path");
  }
  if (thread.waited) return;
  if (access != Access::kRead) {
    fail(ErrorKind::kRace, site, instruction,
         "a store before griddepcontrol.wait: the launch ahead may still use what lies there");
  }
  if (!grid.session->is_constant(address, bytes)) {
    fail(ErrorKind::kRace, site, instruction,
         "a load before griddepcontrol.wait of what is no constant: the launch ahead may still "
         "write there");
  }
}

}  // namespace

uint8_t* dynamic_shared() { return self().block->shared.data(); }

uint32_t shared_bytes() { return self().block->shared.bytes(); }

uint32_t shared_address(const void* pointer) {
  return kSharedBase +
         static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - dynamic_shared());
}

uint8_t* shared(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                uint32_t alignment, Access access) {
  const Quiet quiet;
  FiberThread& thread = self();
  Block& block = *thread.block;
  Session& session = *block.grid->session;
  SharedMemory& memory = block.shared;
  memory.check_bounds(site, instruction, address, bytes, alignment);
  SiteRecord& record = session.record_of(site, instruction);
  if (session.counting) {
    block.warps[thread.warp].requests.add(
        record, access == Access::kWrite ? Space::kSharedStore : Space::kSharedLoad, thread.lane,
        address, bytes);
  }
  const uint32_t offset = address - kSharedBase;
  uint8_t* pointer = memory.data() + offset;
  if (access == Access::kRead) {
    memory.read(site, instruction, block, thread, offset, bytes, record.id);
    tell_read(pointer, bytes);
  } else if (access == Access::kWrite) {
    memory.write(site, instruction, block, thread, offset, bytes, record.id, false);
    tell_write(pointer, bytes);
  }
  return pointer;
}

void check_global(Site site, const char* instruction, const void* address, uint32_t bytes,
                  Access access) {
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where < kLowestAddress) {
    fail(ErrorKind::kAddress, site, instruction, "a null pointer (" + hex(where) + ")");
  }
  check_early(site, instruction, address, bytes, access);
}

// Where blocks run together: nothing orders the access against another block's.
static void check_order(Site site, const char* instruction, const void* address, uint32_t bytes,
                        Access access, bool atomic) {
  const FiberThread& thread = self();
  const Grid& grid = *thread.block->grid;
  if (grid.order == nullptr) return;
  if (access == Access::kRead && grid.session->is_constant(address, bytes)) return;
  const std::string race = grid.order->touch(
      {site, instruction, grid.order->column(thread.block->first_warp + thread.warp), thread.linear,
       thread.block->linear, access != Access::kRead, atomic,
       std::strcmp(instruction, kReadOnly) == 0},
      reinterpret_cast<uintptr_t>(address), bytes);
  if (!race.empty()) fail(ErrorKind::kRace, site, instruction, race);
  if (access == Access::kWrite) grid.order->overwrite(address, bytes);
}

void read_until_now(Site site, const char* instruction, const void* from, uint32_t bytes) {
  check_order(site, instruction, from, bytes, Access::kRead, false);
}

// The same for every access to global memory; `atomic`: of those that order others, or need none.
static void touch_global(Site site, const char* instruction, const void* address, uint32_t bytes,
                         uint32_t alignment, Access access, bool atomic) {
  check_global(site, instruction, address, bytes, access);
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where % alignment != 0) {
    fail(ErrorKind::kAddress, site, instruction,
         "global address " + hex(where) + " is not a multiple of " + std::to_string(alignment));
  }
  check_order(site, instruction, address, bytes, access, atomic);
  FiberThread& thread = self();
  Grid& grid = *thread.block->grid;
  Session& session = *grid.session;
  if (access != Access::kRead) ++grid.progress;
  if (session.counting || session.checking_tensors) {
    session.touch_tensor(site, instruction, address, bytes, access != Access::kRead);
    if (access == Access::kAtomic) session.touch_tensor(site, instruction, address, bytes, false);
  }
  if (!session.counting) return;
  SiteRecord& record = session.record_of(site, instruction);
  if (access == Access::kAtomic) {
    ++record.counters.global_atomics;
    return;
  }
  thread.block->warps[thread.warp].requests.add(
      record, access == Access::kWrite ? Space::kGlobalStore : Space::kGlobalLoad, thread.lane,
      where, bytes);
}

void global(Site site, const char* instruction, const void* address, uint32_t bytes,
            uint32_t alignment, Access access) {
  const Quiet quiet;
  touch_global(site, instruction, address, bytes, alignment, access, access == Access::kAtomic);
}

void prefetch(Site site, const char* instruction, const void* address) {
  const Quiet quiet;
  check_early(site, instruction, address, 1, Access::kRead);
  const Session& session = *self().block->grid->session;
  if (session.checking_tensors) session.find_tensor(site, instruction, address, 1);
}

void grid_dependency_wait(Site) { self().waited = true; }

void atomic_point(Site site, const char* instruction, const void* address, uint32_t bytes,
                  Access access, Ordering ordering) {
  const Quiet quiet;
  touch_global(site, instruction, address, bytes, bytes, access, true);
  FiberThread& thread = self();
  const bool acquires = ordering == Ordering::kAcquire || ordering == Ordering::kAcquireRelease;
  const bool releases = ordering == Ordering::kRelease || ordering == Ordering::kAcquireRelease;
  if (access == Access::kRead) {
    if (thread.polled != address) thread.polls = 0;
    thread.polled = address;
    if (++thread.polls >= kPolls) {
      thread.polls = 0;
      yield(site, instruction);
    }
  }
  // A fence before a relaxed atomic makes it a release; one after it makes it an acquire (PTX ISA,
  // memory consistency model, release and acquire patterns).
  if (access != Access::kRead && releases) {
    tell_release(address);
  } else if (access != Access::kRead && thread.fenced) {
    tell_fenced_release(address, thread.known_at_fence);
  }
  if (access == Access::kWrite) return;
  if (acquires) {
    tell_acquire(address);
  } else {
    thread.relaxed_loads.push_back(address);
    if (thread.relaxed_loads.size() > 64) thread.relaxed_loads.erase(thread.relaxed_loads.begin());
  }
}

void fence(Site) {
  const Quiet quiet;
  FiberThread& thread = self();
  thread.fenced = true;
  for (const void* address : thread.relaxed_loads) tell_acquire(address);
  thread.relaxed_loads.clear();
  tell_fence(thread.known_at_fence);
}

}  // namespace resnet_fused::emulator
