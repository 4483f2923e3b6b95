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

void SharedMemory::reset(uint32_t bytes, int warps, std::shared_ptr<Clocks> clocks,
                         int first_column) {
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
  if (clocks->base() == 0) {  // epochs start again
    std::fill(written_.begin(), written_.end(), 0);
    for (auto& reads : reads_) std::fill(reads.begin(), reads.end(), 0);
  }
  // Entries of earlier blocks stay; their epochs say that they are of no concern.
  base_epoch_ = clocks->base();
  clocks_ = std::move(clocks);
  first_column_ = first_column;
  warps_ = warps;
  if (written_.size() < bytes) written_.resize(bytes);
  if (fences_.size() < bytes) fences_.resize(bytes);
  if (static_cast<int>(reads_.size()) < warps) reads_.resize(warps);
  const size_t words = (bytes + kWordBytes - 1) / kWordBytes;
  for (auto& reads : reads_) {
    if (reads.size() < words) reads.resize(words);
  }
  proxy_.clear();
  readers_.reset(bytes);
}

Seen SharedMemory::seen(const FiberThread& thread) const {
  return clocks_->seen(column(thread.warp));
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
  const Seen seen = this->seen(thread);
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
    if (!seen.before(column(writer / kWarpSize), epoch_of(entry))) {
      fail(ErrorKind::kRace, site, instruction,
           "reads " + place(i) + ", written by " + who(thread, entry) +
               " with no barrier between the two");
    }
  }
  std::vector<uint64_t>& reads = reads_[thread.warp];
  const uint64_t stamp = pack(seen.own_epoch, site_id, static_cast<uint32_t>(thread.linear));
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
  const Seen seen = this->seen(thread);
  if (!readers_.empty() && checking) {
    const AsyncReaders::Operation* reader = readers_.reading(seen, offset, bytes);
    if (reader != nullptr) {
      const std::string waits = reader->waits.empty()
                                    ? "which nobody has waited for yet"
                                    : "with no barrier between the wait for that and this";
      fail(ErrorKind::kRace, site, instruction,
           "writes " + place(offset) + " and the following, read asynchronously for " +
               who(thread, pack(0, reader->site_id, static_cast<uint32_t>(reader->thread))) + ", " +
               waits);
    }
  }
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
    if (!seen.before(column(writer / kWarpSize), epoch_of(entry))) {
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
    const uint32_t known = seen.known[column(warp)];
    for (uint32_t word = first_word; word <= last_word; ++word) {
      if (epoch_of(reads[word]) <= known) continue;
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
  const uint64_t entry =
      pack(seen(thread).own_epoch, site_id, static_cast<uint32_t>(thread.linear)) |
      (in_flight ? kInFlight : 0);
  std::fill_n(&written_[offset], bytes, entry);
  std::fill_n(&fences_[offset], bytes, static_cast<uint32_t>(thread.proxy_fences.size()));
}

void SharedMemory::landed(FiberThread& thread, uint32_t offset, uint32_t bytes) {
  const uint32_t epoch = seen(thread).own_epoch;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const uint64_t entry = written_[i] & ~kInFlight;
    written_[i] = (entry & 0xFFFFFFFFu) | static_cast<uint64_t>(epoch) << 32;
  }
  std::fill_n(&fences_[offset], bytes, static_cast<uint32_t>(thread.proxy_fences.size()));
}

std::vector<uint32_t> SharedMemory::known_to(const Block& block, Issuers issuers) const {
  std::vector<uint32_t> all;
  for (int i = issuers.first; i < issuers.first + issuers.count; ++i) {
    const FiberThread& thread = *block.threads.at(i);
    if (i > issuers.first && thread.lane != 0) continue;  // lanes share their warp's knowledge
    const int own = column(thread.warp);
    std::vector<uint32_t> row = clocks_->row(thread.warp);
    --row[own];  // another lane's accesses of this epoch are not ordered
    if (all.empty()) all = row;
    for (size_t k = 0; k < row.size(); ++k) all[k] = std::min(all[k], row[k]);
  }
  return all;
}

std::string SharedMemory::refuse_async(const Block& block, Issuers issuers,
                                       const std::vector<uint32_t>& known, uint32_t offset) const {
  const uint64_t entry = written_[offset];
  if (epoch_of(entry) <= base_epoch_) {
    const bool checking = block.grid->session->checking_unwritten;
    return checking ? "reads " + place(offset) + ", which nobody has written" : "";
  }
  const FiberThread& writer = *block.threads[thread_of(entry)];
  if ((entry & kInFlight) != 0) {
    return "reads " + place(offset) + ", which a copy in flight is writing: issued by " +
           who(writer, entry) + ", not yet waited for";
  }
  if (writer.proxy_fences.size() <= fences_[offset]) {
    return "reads " + place(offset) + ", written by " + who(writer, entry) +
           ", which has executed no fence.proxy.async since";
  }
  if (issuers.count == 1 && issuers.first == writer.linear) return "";
  if (writer.proxy_fences[fences_[offset]] <= known[column(writer.warp)]) return "";
  return "reads " + place(offset) + ", written by " + who(writer, entry) +
         ", with no barrier between that thread's fence.proxy.async and this";
}

void SharedMemory::async_read(Site site, const char* instruction, const Block& block,
                              Issuers issuers, const std::vector<uint32_t>& known, uint32_t offset,
                              uint32_t bytes) const {
  const Session& session = *block.grid->session;
  if (!session.checking_proxies) return;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (i > offset && written_[i] == written_[i - 1] && fences_[i] == fences_[i - 1]) continue;
    const std::string what = refuse_async(block, issuers, known, i);
    if (!what.empty()) fail(ErrorKind::kState, site, instruction, what);
  }
}

void SharedMemory::async_view(const Block& block, Issuers issuers, uint32_t offset, uint32_t bytes,
                              uint8_t* to) {
  if (block.grid->session->checking_proxies) {
    std::memcpy(to, data_ + offset, bytes);
    return;
  }
  // Bytes that are not published keep what was seen there last.
  if (proxy_.empty()) proxy_.assign(bytes_, kPoison);
  const std::vector<uint32_t> known = known_to(block, issuers);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (refuse_async(block, issuers, known, i).empty()) proxy_[i] = data_[i];
  }
  std::memcpy(to, proxy_.data() + offset, bytes);
}

bool SharedMemory::is_written(uint32_t offset) const {
  return epoch_of(written_[offset]) > base_epoch_;
}

bool SharedMemory::is_in_flight(uint32_t offset) const {
  return is_written(offset) && (written_[offset] & kInFlight) != 0;
}

}  // namespace resnet_fused::emulator
