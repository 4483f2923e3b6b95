// The message of a deadlock: who waits for what.
#include <string>

#include "block.h"

namespace resnet_fused::emulator {
namespace {

constexpr size_t kLongestMessage = 4000;

bool has_left(const FiberThread& thread) {
  return (thread.block->warps[thread.warp].done >> thread.lane & 1) != 0;
}

bool wait_alike(const FiberThread& a, const FiberThread& b) {
  if (has_left(a) || has_left(b)) return has_left(a) == has_left(b);
  return a.wait.site.line == b.wait.site.line && a.wait.instruction == b.wait.instruction &&
         a.wait.barrier == b.wait.barrier && a.wait.mbarrier == b.wait.mbarrier;
}

// "threads 0-31 wait in bar.sync 1 (32 of 64 threads have come) at conv.cuh:12"
std::string describe_wait(const FiberThread& thread, int first, int last) {
  const bool one = first == last;
  std::string text = one ? "thread " + std::to_string(first)
                         : "threads " + std::to_string(first) + "-" + std::to_string(last);
  if (has_left(thread)) return text + (one ? " has left" : " have left");
  text += one ? " waits in " : " wait in ";
  text += thread.wait.instruction;
  if (thread.wait.barrier >= 0) {
    const NamedBarrier& barrier = thread.block->barriers[thread.wait.barrier];
    text += ", barrier " + std::to_string(thread.wait.barrier) + " (" +
            std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
            " threads have come)";
  }
  if (thread.wait.mbarrier != nullptr) text += ", " + describe(*thread.wait.mbarrier);
  return text + " at " + describe(thread.wait.site);
}

}  // namespace

Wait Grid::first_wait() const {
  for (const auto& block : blocks) {
    for (const auto& thread : block->threads) {
      if (!has_left(*thread)) return thread->wait;
    }
  }
  return {};
}

std::string Grid::who_waits() const {
  std::string text;
  for (const auto& block : blocks) {
    if (block->alive == 0) continue;
    const uint3 index = block->threads.front()->block_index;
    text += (text.empty() ? "block (" : ". Block (") + std::to_string(index.x) + ", " +
            std::to_string(index.y) + ", " + std::to_string(index.z) + "): ";
    const auto count = static_cast<int>(block->threads.size());
    for (int i = 0; i < count;) {
      int last = i;
      while (last + 1 < count && wait_alike(*block->threads[i], *block->threads[last + 1])) ++last;
      text += (i > 0 ? "; " : "") + describe_wait(*block->threads[i], i, last);
      i = last + 1;
    }
    if (text.size() > kLongestMessage) return text + " ...";
  }
  return text;
}

}  // namespace resnet_fused::emulator
