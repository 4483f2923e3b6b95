// Copies in flight: when they change shared memory, and when they may be read.
#include <cstring>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

constexpr uint8_t kPoison = 0xFF;

// Through L2 alone (.cg) where the size allows it (PTX ISA, cp.async).
const char* name_of_copy(int bytes) { return bytes == 16 ? "cp.async.cg" : "cp.async.ca"; }

void take_effect(FiberThread& thread, PendingCopy& copy) {
  if (copy.effective) return;
  std::memcpy(thread.block->shared.data() + (copy.to - kSharedBase), copy.data, copy.bytes);
  copy.effective = true;
}

// The oldest `count` copies have been waited for.
void land(FiberThread& thread, size_t count) {
  SharedMemory& shared = thread.block->shared;
  for (size_t i = 0; i < count; ++i) {
    PendingCopy& copy = thread.copies[i];
    take_effect(thread, copy);
    const uint32_t offset = copy.to - kSharedBase;
    shared.landed(thread, offset, copy.bytes);
    tell_write(shared.data() + offset, copy.bytes);
    if (copy.valid_bytes > 0) {
      read_until_now(copy.site, name_of_copy(copy.bytes), copy.from, copy.valid_bytes);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
}

}  // namespace

void settle_some(FiberThread& thread) {
  Grid& grid = *thread.block->grid;
  if (grid.schedule.asynchrony != Asynchrony::kRandom) return;
  for (PendingCopy& copy : thread.copies) {
    if (!copy.effective && grid.random.below(4) == 0) take_effect(thread, copy);
  }
}

void copy_async(Site site, uint32_t to, const void* from, int bytes, int valid_bytes) {
  const char* const instruction = name_of_copy(bytes);
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(site, instruction, "a size of " + std::to_string(bytes) + " bytes: expected 4, 8 or 16");
  }
  if (valid_bytes < 0 || valid_bytes > bytes) {
    fail(site, instruction,
         "a source size of " + std::to_string(valid_bytes) + ": expected 0 to " +
             std::to_string(bytes));
  }
  if (valid_bytes > 0) {
    global(site, instruction, from, static_cast<uint32_t>(valid_bytes), bytes, Access::kRead);
  } else if (reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail(ErrorKind::kAddress, site, instruction,
         "global address " + hex(reinterpret_cast<uintptr_t>(from)) + " is not a multiple of " +
             std::to_string(bytes) + ", though nothing is read from it");
  }
  PendingCopy copy{to, bytes, false, site, {}, from, static_cast<uint32_t>(valid_bytes)};
  // Read here rather than later, so that a sanitizer names the line that issued the copy.
  std::memcpy(copy.data, from, static_cast<size_t>(valid_bytes));

  const Quiet quiet;
  FiberThread& thread = self();
  Block& block = *thread.block;
  const auto size = static_cast<uint32_t>(bytes);
  block.shared.check_bounds(site, instruction, to, size, size);
  SiteRecord& record = block.grid->session->record_of(site, instruction);
  if (block.grid->session->counting) {
    block.warps[thread.warp].requests.add(record, Space::kSharedStore, thread.lane, to, size);
  }
  const uint32_t offset = to - kSharedBase;
  block.shared.write(site, instruction, block, thread, offset, size, record.id, true);
  uint8_t* destination = block.shared.data() + offset;
  tell_write(destination, size);
  if (block.grid->schedule.asynchrony == Asynchrony::kEager) {
    take_effect(thread, copy);
  } else {
    std::memset(destination, kPoison, size);
  }
  thread.copies.push_back(copy);
  ++thread.uncommitted;
  settle_some(thread);
}

void commit_group(Site) {
  const Quiet quiet;
  FiberThread& thread = self();
  thread.group_sizes.push_back(thread.uncommitted);  // a group may be empty
  thread.uncommitted = 0;
  settle_some(thread);
}

void wait_group(Site site, int pending) {
  if (pending < 0) {
    fail(site, "cp.async.wait_group", std::to_string(pending) + " groups: expected 0 or more");
  }
  const Quiet quiet;
  FiberThread& thread = self();
  settle_some(thread);
  if (thread.group_sizes.size() <= static_cast<size_t>(pending)) return;
  const size_t complete = thread.group_sizes.size() - static_cast<size_t>(pending);
  size_t copies = 0;
  for (size_t i = 0; i < complete; ++i) copies += thread.group_sizes[i];
  thread.group_sizes.erase(thread.group_sizes.begin(), thread.group_sizes.begin() + complete);
  land(thread, copies);
}

}  // namespace resnet_fused::emulator
