// The values of a ChannelVector as a GPU's thread reads and writes them.
#pragma once

#include "../ptx/memory.h"
#include "channel_vector.h"

namespace resnet_fused {

constexpr int kVectorThreads = 128;

RF_DEVICE double load_value(const ChannelVector& vector, int64_t k) {
  if (vector.is_double) return ptx::load_global(static_cast<const double*>(vector.data) + k);
  return ptx::load_global(static_cast<const float*>(vector.data) + k);
}

RF_DEVICE void store_value(const ChannelVector& vector, int64_t k, double value) {
  if (vector.is_double) {
    ptx::store_global(static_cast<double*>(vector.data) + k, value);
  } else {
    ptx::store_global(static_cast<float*>(vector.data) + k, static_cast<float>(value));
  }
}

// What a vector holds of a value that is stored there: what others will read.
RF_DEVICE double as_stored(const ChannelVector& vector, double value) {
  return vector.is_double ? value : static_cast<double>(static_cast<float>(value));
}

// Elements a channel: over all ranks where `total` [1] says so.
RF_DEVICE double elements_of(const double* total, double count) {
  return total != nullptr ? ptx::load_global(total) : count;
}

}  // namespace resnet_fused
