// Who has touched which bytes of global memory in a launch, and who knows of it.
//
// Blocks hand each other results through global memory, whether they wait for one another or the
// last one to arrive takes what the others have left. Two accesses of
// one byte, of which one writes, must be ordered by releases and acquires (PTX ISA, Memory
// Consistency Model) unless both are atomic. Vector clocks as in shared memory, one for each warp
// of the grid: a release leaves what a warp knows with an address or a barrier, an acquire takes
// it.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "errors.h"

namespace resnet_fused::emulator {

// One access of a thread.
struct GlobalAccess {
  Site site;
  const char* instruction;
  int column;  // of its warp, among those of all blocks of the launch
  int thread;  // in its block
  uint64_t block;
  bool writes;
  bool atomic;
  bool read_only;  // by the path for what nobody writes while the kernel runs: no order helps it
};

class GlobalOrder {
 public:
  // `warps`: of all blocks of the launch.
  explicit GlobalOrder(int warps);

  // So many warps follow those that have run. What they tell one another by barriers, which lie
  // where others lay before, says nothing of those.
  void begin_blocks(int warps);
  // Of a warp by its number among those that run at present.
  int column(int warp) const { return first_ + warp; }

  void release(int column, const void* token);
  void acquire(int column, const void* token);
  // What the warp knows; what it does from now on is no part of it.
  std::vector<uint32_t> fence(int column);
  void release(const void* token, const std::vector<uint32_t>& known);
  // A store takes the place of what has been released by writes of the same bytes: only chains of
  // read-modify-writes hand that on (PTX ISA, Memory Consistency Model, Observation order).
  void overwrite(const void* address, uint32_t bytes);
  // What the access races with, in words; empty if nothing. `bytes` do not cross a multiple of 16.
  std::string touch(const GlobalAccess& access, uintptr_t address, uint32_t bytes);

 private:
  struct Entry {
    GlobalAccess access;
    uint32_t epoch;
    uint32_t bytes;  // a bit for each of the chunk
  };
  bool ordered(const Entry& earlier, int column) const {
    return earlier.access.column == column || earlier.epoch <= rows_[column][earlier.access.column];
  }

  int first_ = 0;                            // column of the first warp that runs
  int running_ = 0;                          // warps
  std::vector<std::vector<uint32_t>> rows_;  // [warps][warps], the epochs that each has been told
  std::unordered_map<const void*, std::vector<uint32_t>> released_;
  std::unordered_map<uintptr_t, std::vector<Entry>> chunks_;  // of 16 bytes
};

}  // namespace resnet_fused::emulator
