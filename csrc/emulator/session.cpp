#include "session.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "inspect.h"

namespace resnet_fused::emulator {

thread_local Session* current_session __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

uint64_t count_bits(const std::vector<uint64_t>& bits) {
  uint64_t total = 0;
  for (const uint64_t word : bits) total += std::popcount(word);
  return total;
}

void set_bits(std::vector<uint64_t>& bits, size_t first, size_t count) {
  // Accesses are aligned and at most 16 bytes long, so one never crosses a word of bits, unless the
  // tensor itself starts in the middle of an access's alignment.
  const size_t shift = first % 64;
  if (shift + count <= 64 && count < 64) {
    bits[first / 64] |= ((uint64_t{1} << count) - 1) << shift;
    return;
  }
  for (size_t i = first; i < first + count; ++i) bits[i / 64] |= uint64_t{1} << (i % 64);
}

}  // namespace

uint64_t Tensor::unique_bytes_read() const { return count_bits(read); }
uint64_t Tensor::unique_bytes_written() const { return count_bits(written); }

Session::Session() : outer_(current_session), cache_(kCacheEntries) { current_session = this; }

Session::~Session() { current_session = outer_; }

void Session::plant(PlantedFault fault) {
  if (fault.fault == Fault::kNone) throw std::invalid_argument("plant: expected a fault, got none");
  planted_ = std::move(fault);
  for (SiteRecord& record : records_) mark(record);
}

void Session::stop_at(Stop stop) {
  element_bytes(stop.tile.element);
  stop_ = std::move(stop);
  stopping_ = true;
  passed_ = 0;
  for (SiteRecord& record : records_) mark(record);
}

void Session::mark(SiteRecord& record) const {
  const bool here = planted_.fault != Fault::kNone && record.site.line == planted_.line &&
                    planted_.instruction == record.instruction &&
                    ends_with(record.file, planted_.file);
  record.planted = here ? planted_.fault : Fault::kNone;
  record.may_stop = stopping_ && (stop_.line == 0 || stop_.line == record.site.line) &&
                    ends_with(record.file, stop_.file);
}

bool Session::stops(const SiteRecord& record, uint64_t block, int thread) {
  return record.may_stop && block == stop_.block && thread == stop_.thread &&
         passed_++ == stop_.occurrence;
}

SiteRecord& Session::find_record(Site site, const char* instruction) {
  // By content: one line may come in under several names, one name at several addresses.
  const std::string file = normal_path(site.file);
  for (SiteRecord& record : records_) {
    if (record.site.line == site.line && std::strcmp(record.instruction, instruction) == 0 &&
        record.file == file) {
      return record;
    }
  }
  if (records_.size() > 0xFFFE) throw std::length_error("more than 65,534 sites in one session");
  SiteRecord& record = records_.emplace_back();
  record.site = site;
  record.instruction = instruction;
  record.file = file;
  record.id = static_cast<uint16_t>(records_.size() - 1);
  mark(record);
  return record;
}

void Session::register_tensor(const std::string& name, const void* data, size_t bytes,
                              bool writable, bool constant) {
  tensors_.push_back({name, static_cast<const uint8_t*>(data), bytes, writable, constant, {}, {}});
}

bool Session::is_constant(const void* address, uint32_t bytes) const {
  const auto* first = static_cast<const uint8_t*>(address);
  bool constant = false;
  for (const Tensor& tensor : tensors_) {
    if (first + bytes <= tensor.data || first >= tensor.data + tensor.bytes) continue;
    if (!tensor.constant) return false;
    constant = true;
  }
  return constant;
}

void Session::touch_tensor(Site site, const char* instruction, const void* address, uint32_t bytes,
                           bool write) {
  const auto* first = static_cast<const uint8_t*>(address);
  for (Tensor& tensor : tensors_) {
    if (first < tensor.data || first + bytes > tensor.data + tensor.bytes) continue;
    if (write && !tensor.writable) {
      if (checking_tensors) {
        fail(ErrorKind::kAddress, site, instruction,
             "a store to " + tensor.name + ", which the launch may only read");
      }
      continue;  // an output may lie inside of what another name covers
    }
    if (!counting) return;
    std::vector<uint64_t>& bits = write ? tensor.written : tensor.read;
    if (bits.empty()) bits.resize((tensor.bytes + 63) / 64);  // one a byte, where they are counted
    set_bits(bits, static_cast<size_t>(first - tensor.data), bytes);
    return;
  }
  if (checking_tensors) find_tensor(site, instruction, address, bytes);
}

void Session::find_tensor(Site site, const char* instruction, const void* address,
                          uint32_t bytes) const {
  const auto* first = static_cast<const uint8_t*>(address);
  std::string nearest;
  for (const Tensor& tensor : tensors_) {
    const int64_t offset = first - tensor.data;
    if (offset >= 0 && first + bytes <= tensor.data + tensor.bytes) return;
    nearest += (nearest.empty() ? "" : ", ") + tensor.name + " (byte " + std::to_string(offset) +
               " of " + std::to_string(tensor.bytes) + ")";
  }
  fail(ErrorKind::kAddress, site, instruction,
       std::to_string(bytes) + " bytes at " + hex(reinterpret_cast<uintptr_t>(address)) +
           " lie in no tensor of the launch: " + nearest);
}

Report Session::report() const {
  Report report;
  report.launches = launches;
  report.blocks = blocks;
  for (const SiteRecord& record : records_) {
    report.counters += record.counters;
    ReachedSite reached{record.file, record.site.line, record.instruction,
                        {},          record.hits,      record.counters};
    for (int i = 1; i < kFaults; ++i) {
      if ((record.possible >> i & 1) != 0) reached.possible.push_back(static_cast<Fault>(i));
    }
    report.sites.push_back(std::move(reached));
  }
  for (const Tensor& tensor : tensors_) {
    report.tensors.push_back(
        {tensor.name, tensor.unique_bytes_read(), tensor.unique_bytes_written()});
  }
  return report;
}

}  // namespace resnet_fused::emulator
