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
//   written: 15 in flight, 14 an mbarrier, 13 by the async proxy, 12..10 rank of the thread's block
//            in the cluster, 9..0 thread or async writer
//   read: 15..12 which bytes of the word, 9..0 thread
constexpr uint64_t kInFlight = 1u << 15;
constexpr uint64_t kBarrier = 1u << 14;
constexpr uint64_t kAsync = 1u << 13;
constexpr uint64_t kAuthor = 0x3FFF;
constexpr size_t kAsyncWriters = 1024;  // that an entry can tell apart
static_assert(kMostBlocksOfACluster <= 8);

constexpr uint64_t pack(uint32_t epoch, uint16_t site, uint32_t low) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(site) << 16 | low;
}
constexpr uint32_t epoch_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
constexpr uint16_t site_of(uint64_t entry) { return static_cast<uint16_t>(entry >> 16); }
constexpr int thread_of(uint64_t entry) { return static_cast<int>(entry & 0x3FF); }
constexpr uint32_t rank_of(uint64_t written) { return static_cast<uint32_t>(written >> 10 & 7); }
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

uint32_t author_of(const FiberThread& thread) {
  return static_cast<uint32_t>(thread.linear) | thread.block->rank << 10;
}

bool wrote(const FiberThread& thread, uint64_t entry) {
  return (entry & kAuthor) == author_of(thread);
}

std::string who(const Block& owner, uint32_t rank, uint64_t entry) {
  const SiteRecord& record = owner.grid->session->records().at(site_of(entry));
  const std::string elsewhere =
      rank == owner.rank ? "" : " of block " + std::to_string(rank) + " of the cluster";
  return describe_thread(thread_of(entry), owner.grid->block_size) + elsewhere + " at " +
         describe(record.site) + " (" + record.instruction + ")";
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
  const auto columns = static_cast<size_t>(clocks_->warps());
  if (reads_.size() < columns) reads_.resize(columns);
  proxy_.clear();
  readers_.reset(bytes);
  async_writers_.clear();
  publications_.clear();
}

Seen SharedMemory::seen(const FiberThread& thread) const {
  return clocks_->seen(thread.block->shared.column(thread.warp));
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

std::string SharedMemory::writer(const Block& owner, uint64_t entry) const {
  if ((entry & kAsync) == 0) return who(owner, rank_of(entry), entry);
  const SiteRecord& record = owner.grid->session->records().at(site_of(entry));
  return "the copy at " + describe(record.site) + " (" + record.instruction +
         "), which completes on the mbarrier at byte " +
         std::to_string(async_writers_[thread_of(entry)].barrier);
}

bool SharedMemory::ordered(const Seen& seen, uint64_t entry) const {
  return seen.before(column_of(entry), epoch_of(entry));
}

int SharedMemory::column_of(uint64_t entry) const {
  if ((entry & kAsync) != 0) return async_writers_[thread_of(entry)].column;
  return static_cast<int>(rank_of(entry)) * warps_ + thread_of(entry) / kWarpSize;
}

void SharedMemory::read(Site site, const char* instruction, const Block& owner,
                        const FiberThread& thread, uint32_t offset, uint32_t bytes,
                        uint16_t site_id) {
  const Session& session = *owner.grid->session;
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
    if ((entry & kInFlight) != 0) {
      fail(ErrorKind::kState, site, instruction,
           "reads " + place(i) + ", which a copy in flight is writing: issued by " +
               writer(owner, entry) + ", not yet waited for");
    }
    if ((entry & kBarrier) != 0) {
      fail(ErrorKind::kState, site, instruction,
           "reads " + place(i) + ", part of an mbarrier: initialised by " + writer(owner, entry));
    }
    if (wrote(thread, entry) || !session.checking_races) continue;
    if (!ordered(seen, entry)) {
      fail(ErrorKind::kRace, site, instruction,
           "reads " + place(i) + ", written by " + writer(owner, entry) +
               ((entry & kAsync) != 0 ? ", for whose phase it has not waited"
                                      : " with no barrier between the two"));
    }
  }
  std::vector<uint64_t>& reads = reads_[seen.own_column];
  const size_t words = (bytes_ + kWordBytes - 1) / kWordBytes;
  if (reads.size() < words) reads.resize(words);
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

void SharedMemory::check_async_readers(Site site, const char* instruction, const Block& owner,
                                       const Seen& seen, uint32_t offset, uint32_t bytes) const {
  if (readers_.empty()) return;
  const AsyncReaders::Operation* reader = readers_.reading(seen, offset, bytes);
  if (reader == nullptr) return;
  const std::string waits = reader->waits.empty()
                                ? "which nobody has waited for yet"
                                : "with no barrier between the wait for that and this";
  fail(ErrorKind::kRace, site, instruction,
       "writes " + place(offset) + " and the following, read asynchronously for " +
           who(owner, owner.rank, pack(0, reader->site_id, static_cast<uint32_t>(reader->thread))) +
           ", " + waits);
}

void SharedMemory::check_readers(Site site, const char* instruction, const Block& owner,
                                 const Seen& seen, uint32_t offset, uint32_t bytes) const {
  const uint32_t first_word = offset / kWordBytes;
  const uint32_t last_word = (offset + bytes - 1) / kWordBytes;
  for (int column = 0; column < clocks_->warps(); ++column) {
    if (column == seen.own_column || reads_[column].size() <= last_word) continue;
    const uint64_t* reads = reads_[column].data();
    const uint32_t known = seen.known[column];
    for (uint32_t word = first_word; word <= last_word; ++word) {
      if (epoch_of(reads[word]) <= known) continue;
      for (uint32_t i = std::max(offset, word * kWordBytes);
           i < std::min(offset + bytes, (word + 1) * kWordBytes); ++i) {
        if ((bytes_of(reads[word]) >> (i % kWordBytes) & 1) == 0) continue;
        fail(ErrorKind::kRace, site, instruction,
             "writes " + place(i) + ", read by " +
                 who(owner, static_cast<uint32_t>(column / warps_), reads[word]) +
                 " with no barrier between the two");
      }
    }
  }
}

void SharedMemory::check_write_order(Site site, const char* instruction, const Block& owner,
                                     const FiberThread& thread, uint32_t offset,
                                     uint32_t bytes) const {
  const bool checking = owner.grid->session->checking_races;
  const Seen seen = this->seen(thread);
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
               writer(owner, entry) + ", not yet waited for");
    }
    if ((entry & kBarrier) != 0) {
      fail(ErrorKind::kState, site, instruction,
           "writes " + place(i) + ", part of an mbarrier: initialised by " + writer(owner, entry));
    }
    if (wrote(thread, entry) || !checking) continue;
    if (!ordered(seen, entry)) {
      fail(ErrorKind::kRace, site, instruction,
           "writes " + place(i) + ", written by " + writer(owner, entry) +
               " with no barrier between the two");
    }
  }
  if (!checking) return;
  check_async_readers(site, instruction, owner, seen, offset, bytes);
  check_readers(site, instruction, owner, seen, offset, bytes);
}

void SharedMemory::write(Site site, const char* instruction, const Block& owner,
                         const FiberThread& thread, uint32_t offset, uint32_t bytes,
                         uint16_t site_id, bool in_flight) {
  check_write_order(site, instruction, owner, thread, offset, bytes);
  const uint64_t entry =
      pack(seen(thread).own_epoch, site_id, author_of(thread)) | (in_flight ? kInFlight : 0);
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
    std::vector<uint32_t> row = clocks_->row(own);
    --row[own];  // another lane's accesses of this epoch are not ordered
    if (all.empty()) all = row;
    for (size_t k = 0; k < row.size(); ++k) all[k] = std::min(all[k], row[k]);
  }
  return all;
}

std::string SharedMemory::refuse_async(const Block& owner, const FiberThread* sole,
                                       const std::vector<uint32_t>& known, uint32_t offset,
                                       bool write) const {
  const uint64_t entry = written_[offset];
  const std::string act = (write ? "writes " : "reads ") + place(offset);
  if (epoch_of(entry) <= base_epoch_) {
    const bool checking = owner.grid->session->checking_unwritten && !write;
    return checking ? act + ", which nobody has written" : "";
  }
  if ((entry & kInFlight) != 0) {
    return act + ", which a copy in flight is writing: issued by " + writer(owner, entry) +
           ", not yet waited for";
  }
  if ((entry & kBarrier) != 0) {
    return act + ", part of an mbarrier: initialised by " + writer(owner, entry);
  }
  if ((entry & kAsync) != 0) {
    if (epoch_of(entry) > known[column_of(entry)]) {
      return act + ", written by " + writer(owner, entry) + ", for whose phase it has not waited";
    }
    if (!async_writers_[thread_of(entry)].generic || published(entry, sole, known)) return "";
    return act + ", written by " + writer(owner, entry) +
           ", with no fence.proxy.async between the wait for that and this";
  }
  const FiberThread& author = *owner.cluster->blocks[rank_of(entry)]->threads[thread_of(entry)];
  if (author.block != &owner) {
    return act + ", written by " + writer(owner, entry) +
           ": no fence that csrc/ptx has makes that seen by the async proxy";
  }
  if (author.proxy_fences.size() <= fences_[offset]) {
    return act + ", written by " + writer(owner, entry) +
           ", which has executed no fence.proxy.async since";
  }
  if (sole == &author) return "";
  if (author.proxy_fences[fences_[offset]] <= known[column(author.warp)]) return "";
  return act + ", written by " + writer(owner, entry) +
         ", with no barrier between that thread's fence.proxy.async and this";
}

bool SharedMemory::published(uint64_t entry, const FiberThread* sole,
                             const std::vector<uint32_t>& known) const {
  return std::any_of(publications_.begin(), publications_.end(), [&](const Publication& one) {
    if (one.column != column_of(entry) || one.epoch < epoch_of(entry)) return false;
    return one.fencer == sole || one.fenced <= known[column(one.fencer->warp)];
  });
}

void SharedMemory::proxy_fence(FiberThread& thread) {
  const Seen seen = this->seen(thread);
  thread.proxy_fences.push_back(seen.own_epoch);
  thread.init_fences.push_back(seen.own_epoch);
  for (const AsyncWriter& writer : async_writers_) {
    if (!writer.generic) continue;
    publications_.push_back({writer.column, seen.known[writer.column], &thread, seen.own_epoch});
  }
}

void SharedMemory::async_read(Site site, const char* instruction, const Block& block,
                              Issuers issuers, const std::vector<uint32_t>& known, uint32_t offset,
                              uint32_t bytes) const {
  if (!block.grid->session->checking_proxies) return;
  const FiberThread* sole = issuers.count == 1 ? block.threads[issuers.first].get() : nullptr;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (i > offset && written_[i] == written_[i - 1] && fences_[i] == fences_[i - 1]) continue;
    const std::string what = refuse_async(block, sole, known, i, false);
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
  const FiberThread* sole = issuers.count == 1 ? block.threads[issuers.first].get() : nullptr;
  const std::vector<uint32_t> known = known_to(block, issuers);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (refuse_async(block, sole, known, i, false).empty()) proxy_[i] = data_[i];
  }
  std::memcpy(to, proxy_.data() + offset, bytes);
}

void SharedMemory::async_write(Site site, const char* instruction, const Block& owner,
                               const FiberThread& issuer, uint32_t offset, uint32_t bytes,
                               uint16_t site_id, int column, uint32_t barrier) {
  const Session& session = *owner.grid->session;
  const SharedMemory& home = issuer.block->shared;
  const std::vector<uint32_t> known = home.known_to(*issuer.block, {issuer.linear, 1});
  // Of what is asynchronous relaxed waits have told as well.
  std::vector<uint32_t> known_async = known;
  Clocks::join(known_async, issuer.async_known);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    if (i > offset && written_[i] == written_[i - 1] && fences_[i] == fences_[i - 1]) continue;
    const bool landing = is_in_flight(i) || (is_written(i) && (written_[i] & kBarrier) != 0);
    if (!landing && !session.checking_proxies) continue;
    const bool async = (written_[i] & kAsync) != 0;
    const std::string what = refuse_async(owner, &issuer, async ? known_async : known, i, true);
    if (!what.empty()) fail(ErrorKind::kState, site, instruction, what);
  }
  if (session.checking_races) {
    const Seen seen = home.seen(issuer);
    check_async_readers(site, instruction, owner,
                        {known_async.data(), seen.own_column, seen.own_epoch}, offset, bytes);
    check_readers(site, instruction, owner, seen, offset, bytes);
  }
  const size_t slot = async_writer(site, instruction, column, barrier, false);
  async_writers_[slot].site_id = site_id;
  const uint64_t entry = pack(clocks_->epoch(column), site_id, static_cast<uint32_t>(slot));
  std::fill_n(&written_[offset], bytes, entry | kAsync | kInFlight);
}

void SharedMemory::hand_over(Site site, const char* instruction, uint32_t offset, uint32_t bytes,
                             int column, uint32_t barrier) {
  const size_t slot = async_writer(site, instruction, column, barrier, true);
  const uint16_t copy = site_of(written_[offset]);
  async_writers_[slot].site_id = copy;
  const uint64_t entry = pack(clocks_->epoch(column), copy, static_cast<uint32_t>(slot));
  std::fill_n(&written_[offset], bytes, entry | kAsync | kInFlight);
}

size_t SharedMemory::async_writer(Site site, const char* instruction, int column, uint32_t barrier,
                                  bool generic) {
  size_t slot = 0;
  while (slot < async_writers_.size() &&
         (async_writers_[slot].column != column || async_writers_[slot].generic != generic)) {
    ++slot;
  }
  if (slot == async_writers_.size()) async_writers_.push_back({column, barrier, generic, 0});
  if (slot >= kAsyncWriters) fail(site, instruction, "copies on more than 1024 mbarriers a block");
  return slot;
}

void SharedMemory::async_landed(uint32_t offset, uint32_t bytes, int column) {
  const uint64_t epoch = uint64_t{clocks_->epoch(column)} << 32;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    written_[i] = (written_[i] & 0xFFFFFFFFu & ~kInFlight) | epoch;
  }
}

void SharedMemory::check_readers_end(const Block& block) const {
  const AsyncReaders::Operation* reader = readers_.unfinished();
  if (reader == nullptr) return;
  const SiteRecord& record = block.grid->session->records().at(reader->site_id);
  fail(ErrorKind::kState, record.site, record.instruction,
       "the block ends before anybody has waited for what this reads of shared memory");
}

Site SharedMemory::last_async_writer(const Block& block, int column) const {
  for (const AsyncWriter& writer : async_writers_) {
    if (writer.column == column) return block.grid->session->records().at(writer.site_id).site;
  }
  return {"", 0};
}

void SharedMemory::mark_barrier(uint32_t offset, bool is_barrier) {
  for (uint32_t i = offset; i < offset + 8; ++i) {
    written_[i] = is_barrier ? written_[i] | kBarrier : 0;
  }
}

void SharedMemory::use_barrier(Site site, const char* instruction, const Block& owner,
                               const FiberThread& thread, uint32_t offset) const {
  const uint64_t entry = written_[offset];
  if (wrote(thread, entry) || !owner.grid->session->checking_races) return;
  if (ordered(thread.block->shared.seen(thread), entry)) return;
  fail(ErrorKind::kRace, site, instruction,
       "uses the mbarrier at " + place(offset) + ", initialised by " + writer(owner, entry) +
           " with no barrier between the two");
}

bool SharedMemory::is_written(uint32_t offset) const {
  return epoch_of(written_[offset]) > base_epoch_;
}

bool SharedMemory::is_in_flight(uint32_t offset) const {
  return is_written(offset) && (written_[offset] & kInFlight) != 0;
}

}  // namespace resnet_fused::emulator
