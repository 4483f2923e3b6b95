#include "shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

constexpr uint8_t kPoison = 0xFF;  // a NaN in every floating-point type
constexpr uint32_t kWordBytes = 4;
constexpr size_t kAlignment = 1024;  // what the kernels declare their dynamic shared memory with

// What is known of a byte's last write, or of a warp's last reads of a word.
//   bits 63..32 epoch, 31..16 site
//   written: 15 in flight, 9..0 thread       read: 15..12 which bytes of the word, 9..0 thread
constexpr uint64_t kInFlight = 1u << 15;

constexpr uint64_t pack(uint32_t epoch, uint16_t site, uint32_t low) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(site) << 16 | low;
}
constexpr uint32_t epoch_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
constexpr uint16_t site_of(uint64_t entry) { return static_cast<uint16_t>(entry >> 16); }
constexpr int thread_of(uint64_t entry) { return static_cast<int>(entry & 0x3FF); }
constexpr uint32_t bytes_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 12 & 0xF); }

// Whether the bytes share one last write, as nearly all accesses find them. The lengths are
// constants so that the compiler makes vector code of the loop.
template <uint32_t kBytes>
bool uniform(const uint64_t* entries) {
  uint64_t differences = 0;
  for (uint32_t i = 1; i < kBytes; ++i) differences |= entries[i] ^ entries[0];
  return differences == 0;
}

// How many of the bytes have to be looked at one by one.
uint32_t to_compare(const uint64_t* entries, uint32_t bytes) {
  const bool one = bytes == 16 ? uniform<16>(entries) : bytes == 4 ? uniform<4>(entries) : false;
  return one ? 1 : bytes;
}

std::string place(uint32_t offset) {
  return "byte " + std::to_string(offset) + " of dynamic shared memory";
}

std::string who(const FiberThread& thread, uint64_t entry) {
  const SiteRecord& record = thread.block->grid->session->records().at(site_of(entry));
  return describe_thread(thread_of(entry), thread.block_size) + " at " + describe(record.site) +
         " (" + record.instruction + ")";
}

}  // namespace

SharedMemory::~SharedMemory() { std::free(data_); }

void SharedMemory::reset(uint32_t bytes, int warps) {
  const size_t capacity = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (capacity != capacity_) {
    std::free(data_);
    data_ = nullptr;
    // Exactly so large that AddressSanitizer guards its end.
    if (capacity > 0) {
      data_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, capacity));
      if (data_ == nullptr) throw std::bad_alloc();
    }
    capacity_ = capacity;
  }
  bytes_ = bytes;
  if (bytes > 0) std::memset(data_, kPoison, capacity);
  uint32_t newest = base_epoch_;
  for (int warp = 0; warp < warps_; ++warp) newest = std::max(newest, known_[warp * warps_ + warp]);
  if (newest > 0xF0000000u) {
    newest = 0;
    std::fill(written_.begin(), written_.end(), 0);
    for (auto& reads : reads_) std::fill(reads.begin(), reads.end(), 0);
  }
  // Entries of earlier blocks stay; their epochs say that they are of no concern.
  base_epoch_ = newest;
  warps_ = warps;
  if (written_.size() < bytes) written_.resize(bytes);
  if (static_cast<int>(reads_.size()) < warps) reads_.resize(warps);
  const size_t words = (bytes + kWordBytes - 1) / kWordBytes;
  for (auto& reads : reads_) {
    if (reads.size() < words) reads.resize(words);
  }
  known_.assign(static_cast<size_t>(warps) * warps, base_epoch_);
  for (int warp = 0; warp < warps; ++warp) known_[warp * warps + warp] = base_epoch_ + 1;
}

void SharedMemory::refuse(Site site, const char* instruction, uint32_t address, uint32_t bytes,
                          uint32_t alignment) const {
  if (address % alignment != 0) {
    fail(ErrorKind::kAddress, site, instruction,
         "shared address " + hex(address) + " is not a multiple of " + std::to_string(alignment));
  }
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  fail(ErrorKind::kAddress, site, instruction,
       std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
           " are outside of the block's " + std::to_string(bytes_) +
           " bytes of dynamic shared memory");
}

void SharedMemory::read(Site site, const char* instruction, FiberThread& thread, uint32_t offset,
                        uint32_t bytes, uint16_t site_id) {
  const Session& session = *thread.block->grid->session;
  const uint32_t* known = &known_[static_cast<size_t>(thread.warp) * warps_];
  uint64_t last = ~uint64_t{0};
  const uint32_t end = offset + to_compare(&written_[offset], bytes);
  for (uint32_t i = offset; i < end; ++i) {
    const uint64_t entry = written_[i];
    if (entry == last) continue;
    last = entry;
    if (epoch_of(entry) <= base_epoch_) {
      if (!session.checking_unwritten) continue;
      fail(ErrorKind::kState, site, instruction,
           "reads " + place(i) + ", which nobody has written");
    }
    const int writer = thread_of(entry);
    if ((entry & kInFlight) != 0) {
      fail(ErrorKind::kState, site, instruction,
           "reads " + place(i) + ", which a copy in flight is writing: issued by " +
               who(thread, entry) + ", not yet waited for");
    }
    if (writer == thread.linear || !session.checking_races) continue;
    const int writer_warp = writer / kWarpSize;
    const bool ordered = writer_warp == thread.warp ? epoch_of(entry) < known[writer_warp]
                                                    : epoch_of(entry) <= known[writer_warp];
    if (!ordered) {
      fail(ErrorKind::kRace, site, instruction,
           "reads " + place(i) + ", written by " + who(thread, entry) +
               " with no barrier between the two");
    }
  }
  std::vector<uint64_t>& reads = reads_[thread.warp];
  const uint64_t stamp = pack(known[thread.warp], site_id, static_cast<uint32_t>(thread.linear));
  if (offset % kWordBytes == 0 && bytes % kWordBytes == 0) {
    for (uint32_t word = offset / kWordBytes; word < (offset + bytes) / kWordBytes; ++word) {
      reads[word] = stamp | 0xF000;
    }
    return;
  }
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    uint64_t& entry = reads[i / kWordBytes];
    const uint64_t bit = uint64_t{1} << (12 + i % kWordBytes);
    const uint64_t earlier = epoch_of(entry) == epoch_of(stamp) ? entry & 0xF000 : 0;
    entry = stamp | earlier | bit;
  }
}

void SharedMemory::check_write_order(Site site, const char* instruction, FiberThread& thread,
                                     uint32_t offset, uint32_t bytes) {
  const bool checking = thread.block->grid->session->checking_races;
  const uint32_t* known = &known_[static_cast<size_t>(thread.warp) * warps_];
  uint64_t last = 0;
  const uint32_t end = offset + to_compare(&written_[offset], bytes);
  for (uint32_t i = offset; i < end; ++i) {
    const uint64_t entry = written_[i];
    if (entry == last) continue;
    last = entry;
    if (epoch_of(entry) <= base_epoch_) continue;
    if ((entry & kInFlight) != 0) {
      fail(ErrorKind::kState, site, instruction,
           "writes " + place(i) + ", which a copy in flight is writing: issued by " +
               who(thread, entry) + ", not yet waited for");
    }
    const int writer = thread_of(entry);
    if (writer == thread.linear || !checking) continue;
    const int writer_warp = writer / kWarpSize;
    const bool ordered = writer_warp == thread.warp ? epoch_of(entry) < known[writer_warp]
                                                    : epoch_of(entry) <= known[writer_warp];
    if (!ordered) {
      fail(ErrorKind::kRace, site, instruction,
           "writes " + place(i) + ", written by " + who(thread, entry) +
               " with no barrier between the two");
    }
  }
  if (!checking) return;
  const uint32_t first_word = offset / kWordBytes;
  const uint32_t last_word = (offset + bytes - 1) / kWordBytes;
  for (int warp = 0; warp < warps_; ++warp) {
    if (warp == thread.warp) continue;
    const uint64_t* reads = reads_[warp].data();
    const uint32_t seen = known[warp];
    for (uint32_t word = first_word; word <= last_word; ++word) {
      if (epoch_of(reads[word]) <= seen) continue;
      for (uint32_t i = std::max(offset, word * kWordBytes);
           i < std::min(offset + bytes, (word + 1) * kWordBytes); ++i) {
        if ((bytes_of(reads[word]) >> (i % kWordBytes) & 1) == 0) continue;
        fail(ErrorKind::kRace, site, instruction,
             "writes " + place(i) + ", read by " + who(thread, reads[word]) +
                 " with no barrier between the two");
      }
    }
  }
}

void SharedMemory::write(Site site, const char* instruction, FiberThread& thread, uint32_t offset,
                         uint32_t bytes, uint16_t site_id, bool in_flight) {
  check_write_order(site, instruction, thread, offset, bytes);
  const uint32_t epoch = known_[static_cast<size_t>(thread.warp) * warps_ + thread.warp];
  const uint64_t entry =
      pack(epoch, site_id, static_cast<uint32_t>(thread.linear)) | (in_flight ? kInFlight : 0);
  std::fill_n(&written_[offset], bytes, entry);
}

void SharedMemory::landed(FiberThread& thread, uint32_t offset, uint32_t bytes) {
  const uint32_t epoch = known_[static_cast<size_t>(thread.warp) * warps_ + thread.warp];
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const uint64_t entry = written_[i] & ~kInFlight;
    written_[i] = (entry & 0xFFFFFFFFu) | static_cast<uint64_t>(epoch) << 32;
  }
}

bool SharedMemory::is_written(uint32_t offset) const {
  return epoch_of(written_[offset]) > base_epoch_;
}

bool SharedMemory::is_in_flight(uint32_t offset) const {
  return is_written(offset) && (written_[offset] & kInFlight) != 0;
}

void SharedMemory::release(int warp, std::vector<uint32_t>& clock) {
  if (clock.empty()) clock.assign(warps_, 0);
  const uint32_t* known = &known_[static_cast<size_t>(warp) * warps_];
  for (int i = 0; i < warps_; ++i) clock[i] = std::max(clock[i], known[i]);
}

void SharedMemory::acquire(int warp, const std::vector<uint32_t>& clock) {
  uint32_t* known = &known_[static_cast<size_t>(warp) * warps_];
  const uint32_t own = known[warp];
  for (int i = 0; i < warps_; ++i) known[i] = std::max(known[i], clock[i]);
  known[warp] = own;
}

void SharedMemory::advance(int warp) { ++known_[static_cast<size_t>(warp) * warps_ + warp]; }

void SharedMemory::everybody_meets() {
  for (int other = 0; other < warps_; ++other) {
    const uint32_t epoch = known_[static_cast<size_t>(other) * warps_ + other];
    for (int warp = 0; warp < warps_; ++warp) {
      known_[static_cast<size_t>(warp) * warps_ + other] = epoch;
    }
  }
  for (int warp = 0; warp < warps_; ++warp) advance(warp);
}

}  // namespace resnet_fused::emulator
