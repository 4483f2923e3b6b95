// Who reads shared memory asynchronously: a byte may not be overwritten before somebody has waited
// for those that read it, and is ordered behind that wait.
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"

namespace resnet_fused::emulator {

struct Issuers;

class AsyncReaders {
 public:
  static constexpr uint32_t kGranule = 16;  // bytes: what asynchronous instructions move at once

  struct Operation {
    uint16_t site_id;
    int thread;  // the first issuer, in the block
    struct Wait {
      int column;
      uint32_t epoch;
    };
    std::vector<Wait> waits;  // empty: nobody has waited for it yet
  };

  void reset(uint32_t bytes) {
    granules_ = (bytes + kGranule - 1) / kGranule;
    lanes_.clear();
    operations_.clear();
  }
  // Operations of the same issuers complete in order.
  uint32_t begin(Issuers issuers, uint16_t site_id);
  void add(uint32_t operation, uint32_t offset, uint32_t bytes);
  // A warp has waited for it; the next ones who wait add what they know.
  void waited(uint32_t operation, int column, uint32_t epoch) {
    operations_[operation].waits.push_back({column, epoch});
  }
  bool empty() const { return operations_.empty(); }
  // An operation that still reads the bytes, as far as a writer with this knowledge can tell; null
  // where there is none.
  const Operation* reading(const Seen& seen, uint32_t offset, uint32_t bytes) const;
  // The first operation that nobody has waited for, or null.
  const Operation* unfinished() const;

 private:
  struct Lane {  // the operations of the same issuers
    int first;
    int count;
    std::vector<uint32_t> last;  // [granules], the latest operation that reads it, + 1
  };

  uint32_t granules_ = 0;
  std::vector<Lane> lanes_;
  std::vector<uint32_t> lane_of_;  // [operations]
  std::vector<Operation> operations_;
};

}  // namespace resnet_fused::emulator
