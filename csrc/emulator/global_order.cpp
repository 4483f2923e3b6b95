#include "global_order.h"

#include <algorithm>

#include "block.h"
#include "clocks.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

constexpr uintptr_t kChunk = 16;  // bytes: no access is wider, and none crosses one

// Whether `later`, ordered behind `earlier`, stands for it: who races with that one races with this
// one as well, or is ordered behind both.
bool covers(const GlobalAccess& later, const GlobalAccess& earlier) {
  if (earlier.writes && !later.writes) return false;
  if (later.atomic && !earlier.atomic) return false;
  if (earlier.read_only && !later.read_only) return false;
  return later.writes || later.column == earlier.column;
}

}  // namespace

GlobalOrder::GlobalOrder(int warps) : rows_(warps, std::vector<uint32_t>(warps, 0)) {
  for (int warp = 0; warp < warps; ++warp) rows_[warp][warp] = 1;
}

void GlobalOrder::begin_blocks(int warps) {
  first_ += running_;
  running_ = warps;
  std::erase_if(released_, [&](const auto& one) {
    return !chunks_.contains(reinterpret_cast<uintptr_t>(one.first) / kChunk);
  });
}

void GlobalOrder::release(int column, const void* token) { release(token, fence(column)); }

void GlobalOrder::release(const void* token, const std::vector<uint32_t>& known) {
  Clocks::join(released_[token], known);
}

std::vector<uint32_t> GlobalOrder::fence(int column) {
  std::vector<uint32_t> known = rows_[column];
  ++rows_[column][column];
  return known;
}

void GlobalOrder::overwrite(const void* address, uint32_t bytes) {
  const auto* at = static_cast<const uint8_t*>(address);
  for (uint32_t i = 0; i < bytes; ++i) released_.erase(at + i);
}

void GlobalOrder::acquire(int column, const void* token) {
  const auto found = released_.find(token);
  if (found != released_.end()) Clocks::join(rows_[column], found->second);
}

std::string GlobalOrder::touch(const GlobalAccess& access, uintptr_t address, uint32_t bytes) {
  const uint32_t mask = ((1u << bytes) - 1) << address % kChunk;
  std::vector<Entry>& entries = chunks_[address / kChunk];
  for (const Entry& entry : entries) {
    const GlobalAccess& other = entry.access;
    if ((entry.bytes & mask) == 0 || (!access.writes && !other.writes)) continue;
    const bool stale = access.read_only || other.read_only;
    if (!stale && ((access.atomic && other.atomic) || ordered(entry, access.column))) continue;
    const Grid& grid = *running_grid;
    return std::string(access.writes ? "writes " : "reads ") + "global memory at " + hex(address) +
           (other.writes ? ", written by " : ", read by ") +
           describe_thread(other.thread, grid.block_size) + " of block " +
           std::to_string(other.block) + " at " + describe(other.site) + " (" + other.instruction +
           (stale ? "); by the read-only path, which knows of no writes"
                  : ") with no release and acquire between the two");
  }
  std::erase_if(entries, [&](const Entry& entry) {
    return (entry.bytes & ~mask) == 0 && covers(access, entry.access) &&
           ordered(entry, access.column);
  });
  entries.push_back({access, rows_[access.column][access.column], mask});
  return "";
}

#if !defined(RF_EMULATOR_TSAN)

namespace {

// The running thread's record; null where nobody looks for races. What is told of the launch itself
// orders nothing between its blocks.
GlobalOrder* order_of(const void* token) {
  if (!in_kernel() || running_grid == nullptr || token == running_grid) return nullptr;
  return running_grid->order.get();
}

int column_of_self() {
  const FiberThread& thread = self();
  return running_grid->order->column(thread.block->first_warp + thread.warp);
}

}  // namespace

void tell_release(const void* token) {
  if (GlobalOrder* order = order_of(token)) order->release(column_of_self(), token);
}

void tell_acquire(const void* token) {
  if (GlobalOrder* order = order_of(token)) order->acquire(column_of_self(), token);
}

void tell_fence(std::vector<uint32_t>& known) {
  if (GlobalOrder* order = order_of(nullptr)) known = order->fence(column_of_self());
}

void tell_fenced_release(const void* token, const std::vector<uint32_t>& known) {
  if (GlobalOrder* order = order_of(token)) order->release(token, known);
}

#endif

}  // namespace resnet_fused::emulator
