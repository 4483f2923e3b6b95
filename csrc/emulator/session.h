// How the launches of this host thread run while the session exists, and what they report.
//
//   emulator::Session session;
//   session.schedule = {Asynchrony::kLazy, Order::kShuffled, Rounding::kNearest, 7};
//   session.counting = true;
//   launch_some_kernel(...);
//   session.report().counters.bank_conflicts();
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "counters.h"
#include "faults.h"
#include "schedule.h"

namespace resnet_fused::emulator {

// One planted fault: the instruction's calls on this line do the wrong thing.
struct PlantedFault {
  std::string file;  // the end of the normalised path: "conv_bn_act_sm80.cuh"
  int line = 0;
  std::string instruction;
  Fault fault = Fault::kNone;
};

// A part of dynamic shared memory to print: rows of `columns` elements, `row_bytes` apart.
struct Tile {
  uint32_t offset = 0;  // bytes into dynamic shared memory
  uint32_t rows = 0;
  uint32_t columns = 0;
  uint32_t row_bytes = 0;
  std::string element = "bf16";  // bf16, f16, f32, u8, u16, u32
};

// Where a run ends with an Error of kind kStopped, whose text holds the tile.
struct Stop {
  uint64_t block = 0;       // in the grid, x fastest
  int thread = 0;           // in the block, x fastest
  std::string file;         // the end of the path; empty: any
  int line = 0;             // 0: any
  uint64_t occurrence = 0;  // how often the thread passes by before
  Tile tile;
};

// A tensor that a launch may touch.
struct Tensor {
  std::string name;
  const uint8_t* data;
  size_t bytes;
  bool writable;
  bool constant;               // no launch writes it: it may be read before the one ahead has ended
  std::vector<uint64_t> read;  // one bit a byte
  std::vector<uint64_t> written;  // one bit a byte

  uint64_t unique_bytes_read() const;
  uint64_t unique_bytes_written() const;
};

struct TensorReport {
  std::string name;
  uint64_t unique_bytes_read;
  uint64_t unique_bytes_written;
};

struct ReachedSite {
  std::string file;
  int line;
  std::string instruction;
  std::vector<Fault> possible;
  uint64_t hits;  // of the planted fault
  Counters counters;
};

struct Report {
  Counters counters;  // of all sites; zero unless the session counts
  std::vector<ReachedSite> sites;
  std::vector<TensorReport> tensors;
  uint64_t launches = 0;
  uint64_t blocks = 0;  // that ran
};

class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Schedule schedule;
  // Blocks of the grid, x fastest, that run; the others are as if they had nothing to do.
  uint64_t first_block = 0;
  uint64_t last_block = std::numeric_limits<uint64_t>::max();
  // Blocks of a plain launch that run at once: with more than one they interleave.
  uint32_t resident_blocks = 1;
  // Blocks of a cooperative launch that fit on the GPU at one time; a larger grid is refused.
  uint64_t cooperative_blocks = std::numeric_limits<uint64_t>::max();
  uint32_t shared_limit = 227 * 1024;  // bytes a block may have: 99 KB on sm_86, 163 KB on sm_80
  bool counting = false;
  bool checking_races = true;  // in shared memory; of a cooperative launch, in global memory too
  bool checking_unwritten = true;  // reads of shared bytes that nobody has written
  bool checking_proxies = true;    // async reads see published bytes alone; else they may be old
  bool checking_tensors = false;   // global accesses lie in registered tensors

  // Plants one fault; the sites that match are known when they are reached, so report().sites says
  // whether it was hit. Throws std::invalid_argument for Fault::kNone.
  void plant(PlantedFault fault);
  // Ends the run just before the thread's next instruction there. Throws std::invalid_argument for
  // an element type that does not exist.
  void stop_at(Stop stop);
  // Names memory, so that its unique bytes are counted and, if checking_tensors, it may be touched.
  // `constant`: an early launch may read it before it waits.
  void register_tensor(const std::string& name, const void* data, size_t bytes, bool writable,
                       bool constant = false);

  Report report() const;

  // For the runtime.
  // Whether the running thread has come to where it is to stop; counts the times.
  bool stops(const SiteRecord& record, uint64_t block, int thread);
  const Stop& stop() const { return stop_; }
  SiteRecord& record_of(Site site, const char* instruction);
  void touch_tensor(Site site, const char* instruction, const void* address, uint32_t bytes,
                    bool write);
  // Throws an Error where the bytes lie in no tensor.
  void find_tensor(Site site, const char* instruction, const void* address, uint32_t bytes) const;
  // Whether the bytes lie in a constant tensor, and in none that is not.
  bool is_constant(const void* address, uint32_t bytes) const;
  const std::deque<SiteRecord>& records() const { return records_; }
  uint64_t launches = 0;
  uint64_t blocks = 0;

 private:
  struct CacheEntry {
    const char* file = nullptr;
    const char* instruction = nullptr;
    int line = 0;
    SiteRecord* record = nullptr;
  };
  static constexpr size_t kCacheEntries = 1024;

  SiteRecord& find_record(Site site, const char* instruction);
  void mark(SiteRecord& record) const;

  Session* outer_;
  std::deque<SiteRecord> records_;  // addresses stay
  std::vector<CacheEntry> cache_;
  PlantedFault planted_;
  Stop stop_;
  bool stopping_ = false;
  uint64_t passed_ = 0;
  std::vector<Tensor> tensors_;
};

// The innermost session of this host thread; null where there is none (a launch then makes one with
// the defaults for itself).
extern thread_local Session* current_session __attribute__((tls_model("initial-exec")));

inline SiteRecord& Session::record_of(Site site, const char* instruction) {
  const auto key = reinterpret_cast<uintptr_t>(site.file) * 31 +
                   reinterpret_cast<uintptr_t>(instruction) + static_cast<uintptr_t>(site.line) * 7;
  CacheEntry& entry = cache_[key % kCacheEntries];
  if (entry.line == site.line && entry.file == site.file && entry.instruction == instruction) {
    return *entry.record;
  }
  SiteRecord& record = find_record(site, instruction);
  entry = {site.file, instruction, site.line, &record};
  return record;
}

}  // namespace resnet_fused::emulator
