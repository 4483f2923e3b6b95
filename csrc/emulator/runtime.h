// The emulator's runtime: what the wrappers in csrc/ptx and the launches call when a kernel runs on
// the CPU. One fiber for each CUDA thread; a block's fibers share one host thread and give way to
// each other only inside of the functions below. docs/emulator.md explains the whole.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "errors.h"
#include "faults.h"
#include "sanitizers.h"
#include "schedule.h"
#include "session.h"
#include "thread.h"

namespace resnet_fused::emulator {

// ---- Launching

// Runs `kernel` once for each thread of the grid, under the current session. Blocks run one after
// another, in the schedule's order, or all at once if `cooperative`. `early`: as if the launch
// ahead still ran; see grid_dependency_wait. Throws the first Error.
void launch(dim3 grid, dim3 block, uint32_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, bool early = false);
// The same in clusters of blocks, which run together; the grid is a multiple of them.
void launch_clusters(dim3 grid, dim3 block, dim3 cluster, uint32_t shared_bytes, bool cooperative,
                     const std::function<void()>& kernel, bool early = false);

// The schedule of the running launch, for wrappers whose meaning depends on it (rounding).
const Schedule& schedule();

// ---- Faults

// Where something is planted, or the session asks to stop.
Fault fault_at_marked(SiteRecord& record);

// The fault planted for this instruction at this site (mostly none); notes that the run came here
// and that each of `possible` could be planted. Every wrapper asks once, before it does anything.
inline Fault fault_at(Site site, const char* instruction, std::initializer_list<Fault> possible) {
  const Quiet quiet;
  SiteRecord& record = current_session->record_of(site, instruction);
  if (!record.listed) [[unlikely]] {
    record.listed = true;
    for (const Fault fault : possible) record.possible |= 1u << static_cast<int>(fault);
  }
  if (record.planted == Fault::kNone && !record.may_stop) return Fault::kNone;
  return fault_at_marked(record);
}

// ---- Memory

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// The dynamic shared memory of the running block, and between pointers into it and addresses.
uint8_t* dynamic_shared();
uint32_t shared_bytes();
uint32_t shared_address(const void* pointer);

// The running block's tile as text: "-" for bytes that nobody has written, "~" for a copy in
// flight. For a debugger, too: call puts(resnet_fused::emulator::shared_tile({0, 8, 32, 64,
// "bf16"}).c_str())
std::string shared_tile(const Tile& tile);

// Checks an access of the running thread to shared memory (bounds, alignment, bytes never written
// or in flight, races), counts it and returns the host pointer; the caller then reads or writes.
// In a collective each lane asks for its own row before it meets the others.
uint8_t* shared(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                uint32_t alignment, Access access);

// Checks and counts an access of the running thread to global memory; the caller then does it, so
// that the sanitizers see it on the kernel's line.
void global(Site site, const char* instruction, const void* address, uint32_t bytes,
            uint32_t alignment, Access access);

// Notes that a line is asked for: it lies in a tensor, and before the wait in a constant one.
void prefetch(Site site, const char* instruction, const void* address);

// griddepcontrol.wait. In an early launch (CUDA C++ Programming Guide, Programmatic Dependent
// Launch) a thread that has not waited must not write, since the launch ahead may still read what
// was there, and may read only what the session calls constant, since anything else may be what the
// launch ahead has yet to write. Every thread waits: a launch that has not waited tells the next
// one nothing of those ahead of it.
void grid_dependency_wait(Site site);

// ---- Asynchronous copies (PTX ISA, cp.async and its completion mechanisms)

// Copies `valid_bytes` from global memory and fills up with zeros to `bytes`. Global memory is read
// at once; shared memory changes when the schedule says, and may be read after wait_group only.
void copy_async(Site site, uint32_t to, const void* from, int bytes, int valid_bytes);
void commit_group(Site site);
void wait_group(Site site, int pending);

// ---- Threads that meet

// All lanes of `mask` meet; the last one to come calls run(arguments), with each lane's `argument`
// by its lane and null for lanes outside of the mask. Orders no memory.
void collective_erased(Site site, const char* instruction, uint32_t mask, void* argument,
                       void (*run)(void* context, void** arguments), void* context);
template <class F>
void collective(Site site, const char* instruction, uint32_t mask, void* argument, F run) {
  collective_erased(
      site, instruction, mask, argument,
      [](void* context, void** arguments) {
        (*static_cast<std::remove_reference_t<F>*>(context))(arguments);
      },
      &run);
}

// bar.warp.sync: the lanes of `mask` meet, and what each wrote before is visible to the others.
void warp_barrier(Site site, uint32_t mask);

// bar.sync (`wait`) or bar.arrive on barrier `id` for `threads` threads; 0: every thread of the
// block that has not left the kernel.
void barrier(Site site, int id, int threads, bool wait);

// Every thread of a cooperative grid meets.
void grid_barrier(Site site);

// Lets others run. A loop that waits for a value in memory must come here (atomic_point does it for
// atomic loads), or it never ends; if nothing else can change the value, that is a deadlock.
void yield(Site site, const char* why);

// ---- Order between blocks

enum class Ordering : uint8_t { kRelaxed, kAcquire, kRelease, kAcquireRelease };

// Comes before an atomic access to global memory: checks and counts it, and tells ThreadSanitizer
// how it orders the thread's other accesses.
void atomic_point(Site site, const char* instruction, const void* address, uint32_t bytes,
                  Access access, Ordering ordering);
// fence.acq_rel: orders what comes before against what comes after, through relaxed atomics.
void fence(Site site);

}  // namespace resnet_fused::emulator
