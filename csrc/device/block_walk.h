// The tiles that a block stays for, one after the other.
#pragma once

#include <cstdint>

#include "portable.h"

namespace resnet_fused {

// Every `step`-th of `count` tiles from `first` on, or in the same distance from the last one.
class BlockWalk {
 public:
  RF_HOST_DEVICE BlockWalk(int32_t count, bool reverse, int32_t first, int32_t step)
      : count_(count), reverse_(reverse), at_(first), step_(step) {}

  RF_HOST_DEVICE bool done() const { return at_ >= count_; }
  // Below 2^31: counts leave room for a grid's blocks, which are fewer than 4096 here.
  RF_HOST_DEVICE void next() { at_ += step_; }
  RF_HOST_DEVICE int32_t index() const { return reverse_ ? count_ - 1 - at_ : at_; }

 private:
  int32_t count_;
  bool reverse_;
  int32_t at_;
  int32_t step_;
};

}  // namespace resnet_fused
