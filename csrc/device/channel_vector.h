// A per-channel vector of float or double, as BatchNorm's arithmetic on such takes it: in double.
#pragma once

#include <cstdint>

#include "portable.h"

namespace resnet_fused {

struct ChannelVector {
  void* data;  // null: absent
  bool is_double;

  double get(int64_t k) const {
    return is_double ? static_cast<const double*>(data)[k]
                     : static_cast<double>(static_cast<const float*>(data)[k]);
  }
  void set(int64_t k, double value) const {
    if (is_double) {
      static_cast<double*>(data)[k] = value;
    } else {
      static_cast<float*>(data)[k] = static_cast<float>(value);
    }
  }
};

}  // namespace resnet_fused
