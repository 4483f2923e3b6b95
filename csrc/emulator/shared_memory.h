// A block's shared memory and what is known of each byte: who wrote it and when, who has read it.
//
// "When" is an epoch of the thread's warp: epochs advance at barriers, which also tell the warps
// that meet there each other's epochs. An access races with an earlier one of another thread if no
// barrier has told it of that thread's epoch (vector clocks, by warps).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "errors.h"
#include "thread.h"

namespace resnet_fused::emulator {

struct FiberThread;

// Shared addresses are 32-bit numbers in a window of their own; dynamic shared memory starts here.
// Not 0, so that an offset taken for an address is out of bounds.
constexpr uint32_t kSharedBase = 1024;

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // For a new block: the contents are poisoned, no byte has been written.
  void reset(uint32_t bytes, int warps);

  uint8_t* data() { return data_; }
  uint32_t bytes() const { return bytes_; }

  // Throws unless the bytes exist and are aligned.
  void check_bounds(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                    uint32_t alignment) const {
    const uint32_t offset = address - kSharedBase;  // wraps around below the base
    if (address % alignment != 0 || offset > bytes_ || bytes > bytes_ - offset) [[unlikely]] {
      refuse(site, instruction, address, bytes, alignment);
    }
  }
  // Offsets from the start of the memory.
  void read(Site site, const char* instruction, FiberThread& thread, uint32_t offset,
            uint32_t bytes, uint16_t site_id);
  // `in_flight`: cp.async has been issued, and the bytes may be read when it has been waited for.
  void write(Site site, const char* instruction, FiberThread& thread, uint32_t offset,
             uint32_t bytes, uint16_t site_id, bool in_flight);
  // The copy has been waited for: its bytes are now like any others of the thread.
  void landed(FiberThread& thread, uint32_t offset, uint32_t bytes);

  bool is_written(uint32_t offset) const;
  bool is_in_flight(uint32_t offset) const;

  // Barriers: a thread of `warp` adds what it knows to `clock`; later learns what `clock` holds.
  void release(int warp, std::vector<uint32_t>& clock);
  void acquire(int warp, const std::vector<uint32_t>& clock);
  void advance(int warp);  // a barrier within the warp
  void everybody_meets();

 private:
  [[noreturn]] void refuse(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                           uint32_t alignment) const;
  void check_write_order(Site site, const char* instruction, FiberThread& thread, uint32_t offset,
                         uint32_t bytes);

  uint8_t* data_ = nullptr;
  size_t capacity_ = 0;
  uint32_t bytes_ = 0;
  int warps_ = 0;
  uint32_t base_epoch_ = 0;                   // anything older belongs to an earlier block
  std::vector<uint64_t> written_;             // [bytes]
  std::vector<std::vector<uint64_t>> reads_;  // [warps][bytes / 4]
  std::vector<uint32_t> known_;               // [warps][warps]
};

}  // namespace resnet_fused::emulator
