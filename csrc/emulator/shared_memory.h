// A block's shared memory and what is known of each byte: who wrote it and when, who has read it.
//
// "When" is an epoch of the thread's warp: epochs advance at barriers, which also tell the warps
// that meet there each other's epochs. An access races with an earlier one of another thread if no
// barrier has told it of that thread's epoch (vector clocks, by warps).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "async_readers.h"
#include "clocks.h"
#include "errors.h"
#include "thread.h"

namespace resnet_fused::emulator {

struct Block;
struct FiberThread;

// Threads of a block that issue one asynchronous instruction: one for a copy, 128 for a wgmma.
struct Issuers {
  int first;  // linear in the block
  int count;
};

// Shared addresses are 32-bit numbers in a window of their own; dynamic shared memory starts here.
// Not 0, so that an offset taken for an address is out of bounds.
constexpr uint32_t kSharedBase = 1024;

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // For a new block: the contents are poisoned, no byte has been written. The clocks are of the
  // block or its cluster, where the block's first warp has this column.
  void reset(uint32_t bytes, int warps, std::shared_ptr<Clocks> clocks, int first_column);
  // The latest epoch that any byte may carry; new clocks start behind it.
  uint32_t newest() const { return clocks_ ? clocks_->newest() : 0; }

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
  // A thread of the cluster reads or writes `owner`'s, which is this memory. Offsets from its
  // start.
  void read(Site site, const char* instruction, const Block& owner, const FiberThread& thread,
            uint32_t offset, uint32_t bytes, uint16_t site_id);
  // `in_flight`: cp.async has been issued, and the bytes may be read when it has been waited for.
  void write(Site site, const char* instruction, const Block& owner, const FiberThread& thread,
             uint32_t offset, uint32_t bytes, uint16_t site_id, bool in_flight);
  // The copy has been waited for: its bytes are now like any others of the thread.
  void landed(FiberThread& thread, uint32_t offset, uint32_t bytes);

  // What every one of the issuers has been told.
  std::vector<uint32_t> known_to(const Block& block, Issuers issuers) const;
  // The async proxy reads bytes: they must have been written, published by their writer's fence,
  // and ordered before every issuer.
  void async_read(Site site, const char* instruction, const Block& block, Issuers issuers,
                  const std::vector<uint32_t>& known, uint32_t offset, uint32_t bytes) const;
  // What the async proxy sees of bytes now.
  void async_view(const Block& block, Issuers issuers, uint32_t offset, uint32_t bytes,
                  uint8_t* to);
  // The async proxy will write bytes of `owner`, this memory's block, for a thread of the same
  // cluster: whoever has read or written them must be ordered before. They are in flight until
  // async_landed; `column` is of the clocks, that of the mbarrier at byte `barrier`.
  void async_write(Site site, const char* instruction, const Block& owner,
                   const FiberThread& issuer, uint32_t offset, uint32_t bytes, uint16_t site_id,
                   int column, uint32_t barrier);
  void async_landed(uint32_t offset, uint32_t bytes, int column);
  // cp.async in flight, which from here on completes on the mbarrier at byte `barrier`. Its bytes
  // are written by the generic proxy: to be seen by the async one they want a fence behind the
  // wait.
  void hand_over(Site site, const char* instruction, uint32_t offset, uint32_t bytes, int column,
                 uint32_t barrier);
  // fence.proxy.async of a thread: publishes what it has written, and the copies for which it has
  // waited by an mbarrier.
  void proxy_fence(FiberThread& thread);
  // The 8 bytes become an mbarrier, which only its own instructions may touch, or end to be one.
  void mark_barrier(uint32_t offset, bool is_barrier);
  // The thread uses an mbarrier of `owner`: its initialisation must be ordered before.
  void use_barrier(Site site, const char* instruction, const Block& owner,
                   const FiberThread& thread, uint32_t offset) const;
  // The block ends: throws where a read has begun that nobody has waited for.
  void check_readers_end(const Block& block) const;
  // Some line that has copied with this mbarrier.
  Site last_async_writer(const Block& block, int column) const;
  AsyncReaders& readers() { return readers_; }

  bool is_written(uint32_t offset) const;
  bool is_in_flight(uint32_t offset) const;

  Clocks& clocks() const { return *clocks_; }
  int column(int warp) const { return first_column_ + warp; }

 private:
  [[noreturn]] void refuse(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                           uint32_t alignment) const;
  void check_write_order(Site site, const char* instruction, const Block& owner,
                         const FiberThread& thread, uint32_t offset, uint32_t bytes) const;
  void check_readers(Site site, const char* instruction, const Block& owner, const Seen& seen,
                     uint32_t offset, uint32_t bytes) const;
  void check_async_readers(Site site, const char* instruction, const Block& owner, const Seen& seen,
                           uint32_t offset, uint32_t bytes) const;
  // Why the async proxy may not read a byte, or write over it; empty where it may. `sole`: the only
  // thread that issues the instruction, or null.
  std::string refuse_async(const Block& owner, const FiberThread* sole,
                           const std::vector<uint32_t>& known, uint32_t offset, bool write) const;
  // Whether every one of the issuers is behind a fence of somebody who had waited for the copy.
  bool published(uint64_t entry, const FiberThread* sole, const std::vector<uint32_t>& known) const;
  // The slot of those that complete on an mbarrier, made when first asked for.
  size_t async_writer(Site site, const char* instruction, int column, uint32_t barrier,
                      bool generic);
  // "thread 3 (3, 0, 0) at file:line (instruction)" of a byte's last write.
  std::string writer(const Block& owner, uint64_t entry) const;
  bool ordered(const Seen& seen, uint64_t entry) const;
  // Of the clocks: whose epochs a byte's last write carries.
  int column_of(uint64_t entry) const;
  Seen seen(const FiberThread& thread) const;

  uint8_t* data_ = nullptr;
  size_t capacity_ = 0;
  uint32_t bytes_ = 0;
  int warps_ = 0;
  int first_column_ = 0;
  std::shared_ptr<Clocks> clocks_;
  uint32_t base_epoch_ = 0;        // anything older belongs to an earlier block
  std::vector<uint64_t> written_;  // [bytes]
  std::vector<uint32_t> fences_;   // [bytes], proxy fences of the writer before its write
  std::vector<std::vector<uint64_t>> reads_;  // [the cluster's warps][bytes / 4, or 0: none yet]
  std::vector<uint8_t> proxy_;                // [bytes], what the async proxy saw last
  AsyncReaders readers_;
  struct AsyncWriter {  // an mbarrier on which copies have completed
    int column;
    uint32_t barrier;  // offset
    bool generic;      // by cp.async
    uint16_t site_id;  // of the latest copy
  };
  std::vector<AsyncWriter> async_writers_;
  struct Publication {  // a fence behind the wait for a phase of an mbarrier
    int column;
    uint32_t epoch;
    const FiberThread* fencer;
    uint32_t fenced;  // the epoch of its warp
  };
  std::vector<Publication> publications_;
};

}  // namespace resnet_fused::emulator
