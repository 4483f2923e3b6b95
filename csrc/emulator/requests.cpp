#include "requests.h"

#include <algorithm>

namespace resnet_fused::emulator {
namespace {

constexpr int kBanks = 32;
constexpr uint64_t kBankBytes = 4;
constexpr uint64_t kSectorBytes = 32;
constexpr uint64_t kLineBytes = 128;

// Distinct blocks of `size` bytes that the accesses touch.
uint64_t distinct(const uint64_t* addresses, int count, uint32_t bytes, uint64_t size) {
  uint64_t blocks[2 * kWarpSize];  // an aligned access of at most 32 bytes touches at most two
  int total = 0;
  for (int i = 0; i < count; ++i) {
    blocks[total++] = addresses[i] / size;
    blocks[total++] = (addresses[i] + bytes - 1) / size;
  }
  std::sort(blocks, blocks + total);
  return static_cast<uint64_t>(std::unique(blocks, blocks + total) - blocks);
}

}  // namespace

int wavefronts(const uint64_t* addresses, int count, uint32_t bytes) {
  uint64_t words[kWarpSize];
  int total = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t last = (addresses[i] + bytes - 1) / kBankBytes;
    for (uint64_t word = addresses[i] / kBankBytes; word <= last; ++word) words[total++] = word;
  }
  std::sort(words, words + total);
  total = static_cast<int>(std::unique(words, words + total) - words);
  int load[kBanks] = {};
  int most = 0;
  for (int i = 0; i < total; ++i) most = std::max(most, ++load[words[i] % kBanks]);
  return most;
}

void WarpRequests::add(SiteRecord& record, Space space, int lane, uint64_t address,
                       uint32_t bytes) {
  const size_t key = size_t{4} * record.id + static_cast<size_t>(space);
  if (key >= stream_of_.size()) stream_of_.resize(key + 1, 0);
  if (stream_of_[key] == 0) {
    streams_.push_back({&record, space, {}, {}});
    stream_of_[key] = static_cast<uint16_t>(streams_.size());
  }
  const auto index = static_cast<uint16_t>(stream_of_[key] - 1);
  Stream& stream = streams_[index];
  if (stream.requests.empty()) open_.push_back(index);
  const uint32_t n = stream.next[lane]++;
  if (n >= stream.requests.size()) stream.requests.push_back({0, bytes, {}});
  Request& request = stream.requests[n];
  request.lanes |= 1u << lane;
  request.address[lane] = address;
  request.bytes = std::max(request.bytes, bytes);
}

void WarpRequests::flush() {
  for (const uint16_t index : open_) {
    Stream& stream = streams_[index];
    for (const Request& request : stream.requests) {
      count(request, stream.space, stream.record->counters);
    }
    stream.requests.clear();
    std::fill(std::begin(stream.next), std::end(stream.next), 0u);
  }
  open_.clear();
}

void WarpRequests::forget() {
  stream_of_.clear();
  streams_.clear();
  open_.clear();
}

void WarpRequests::count(const Request& request, Space space, Counters& counters) {
  uint64_t addresses[kWarpSize];
  int count = 0;
  if (space == Space::kSharedLoad || space == Space::kSharedStore) {
    const int lanes_a_phase = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
    for (int first = 0; first < kWarpSize; first += lanes_a_phase) {
      int in_phase = 0;
      for (int lane = first; lane < first + lanes_a_phase; ++lane) {
        if ((request.lanes >> lane & 1) != 0) addresses[in_phase++] = request.address[lane];
      }
      if (in_phase == 0) continue;
      count += in_phase;
      counters.shared_phases += 1;
      counters.shared_wavefronts += wavefronts(addresses, in_phase, request.bytes);
    }
    counters.shared_bytes += static_cast<uint64_t>(count) * request.bytes;
    (space == Space::kSharedLoad ? counters.shared_load_requests
                                 : counters.shared_store_requests) += 1;
    return;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((request.lanes >> lane & 1) != 0) addresses[count++] = request.address[lane];
  }
  const uint64_t sectors = distinct(addresses, count, request.bytes, kSectorBytes);
  const uint64_t lines = distinct(addresses, count, request.bytes, kLineBytes);
  const uint64_t asked = static_cast<uint64_t>(count) * request.bytes;
  if (space == Space::kGlobalLoad) {
    counters.global_load_requests += 1;
    counters.global_load_sectors += sectors;
    counters.global_load_lines += lines;
    counters.global_load_bytes_asked += asked;
  } else {
    counters.global_store_requests += 1;
    counters.global_store_sectors += sectors;
    counters.global_store_lines += lines;
    counters.global_store_bytes_asked += asked;
  }
}

Counters& Counters::operator+=(const Counters& other) {
  shared_load_requests += other.shared_load_requests;
  shared_store_requests += other.shared_store_requests;
  shared_phases += other.shared_phases;
  shared_wavefronts += other.shared_wavefronts;
  shared_bytes += other.shared_bytes;
  global_load_requests += other.global_load_requests;
  global_load_sectors += other.global_load_sectors;
  global_load_lines += other.global_load_lines;
  global_load_bytes_asked += other.global_load_bytes_asked;
  global_store_requests += other.global_store_requests;
  global_store_sectors += other.global_store_sectors;
  global_store_lines += other.global_store_lines;
  global_store_bytes_asked += other.global_store_bytes_asked;
  global_atomics += other.global_atomics;
  return *this;
}

}  // namespace resnet_fused::emulator
