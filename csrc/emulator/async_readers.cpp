#include "async_readers.h"

#include "shared_memory.h"

namespace resnet_fused::emulator {

uint32_t AsyncReaders::begin(Issuers issuers, uint16_t site_id) {
  size_t lane = 0;
  while (lane < lanes_.size() &&
         (lanes_[lane].first != issuers.first || lanes_[lane].count != issuers.count)) {
    ++lane;
  }
  if (lane == lanes_.size()) {
    lanes_.push_back({issuers.first, issuers.count, std::vector<uint32_t>(granules_, 0)});
  }
  if (operations_.empty()) lane_of_.clear();
  operations_.push_back({site_id, issuers.first, {}});
  lane_of_.push_back(static_cast<uint32_t>(lane));
  return static_cast<uint32_t>(operations_.size() - 1);
}

void AsyncReaders::add(uint32_t operation, uint32_t offset, uint32_t bytes) {
  std::vector<uint32_t>& last = lanes_[lane_of_[operation]].last;
  for (uint32_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
    last[i] = operation + 1;
  }
}

const AsyncReaders::Operation* AsyncReaders::reading(const Seen& seen, uint32_t offset,
                                                     uint32_t bytes) const {
  for (const Lane& lane : lanes_) {
    uint32_t known_good = 0;  // neighbours mostly have the same reader
    for (uint32_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i) {
      if (lane.last[i] == 0 || lane.last[i] == known_good) continue;
      const Operation& operation = operations_[lane.last[i] - 1];
      bool before = false;
      for (const auto& wait : operation.waits) {
        before = before || wait.column == seen.own_column || seen.before(wait.column, wait.epoch);
      }
      if (!before) return &operation;
      known_good = lane.last[i];
    }
  }
  return nullptr;
}

const AsyncReaders::Operation* AsyncReaders::unfinished() const {
  for (const Operation& operation : operations_) {
    if (operation.waits.empty()) return &operation;
  }
  return nullptr;
}

}  // namespace resnet_fused::emulator
