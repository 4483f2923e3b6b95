// The boxes of a set that a block reads, one behind the other, and the sums by which they are
// judged.
#pragma once

#include <cstdint>

#include "../ptx/types.h"
#include "ceilings.h"

namespace resnet_fused {

class CeilingWalk {
 public:
  RF_DEVICE explicit CeilingWalk(const CeilingPath& path)
      : boxes_(path.boxes),
        box_(static_cast<int32_t>(blockIdx.x) / path.together * path.apart % path.boxes) {}

  RF_DEVICE int32_t box() const { return box_; }
  RF_DEVICE void next() {
    if (++box_ == boxes_) box_ = 0;
  }

 private:
  int32_t boxes_;
  int32_t box_;
};

// A number that hangs on every bit of a piece and on the order of its words.
RF_DEVICE uint32_t piece_sum(uint4 piece) {
  return ((piece.x * 3 + piece.y) * 3 + piece.z) * 3 + piece.w;
}

}  // namespace resnet_fused
