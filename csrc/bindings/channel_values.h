// BatchNorm's per-channel vectors as arguments: checked, and as the launches take them.
#pragma once

#include <optional>
#include <vector>

#include "../device/channel_vector.h"
#include "arguments.h"

namespace resnet_fused {

// float32 or float64, dense, of the shape given.
inline ChannelVector values(const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  const ScalarType dtype = t.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(name, ": expected float32 or float64, got ", name_of(dtype));
  }
  check_shape(name, t, "shape", shape);
  if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor");
  return {const_cast<void*>(t.const_data_ptr()), dtype == ScalarType::Double};
}

inline ChannelVector values(const char* name, const std::optional<Tensor>& t,
                            const std::vector<int64_t>& shape) {
  return t ? values(name, *t, shape) : ChannelVector{nullptr, false};
}

// The number of batches, where there is one: one int64 or int32.
struct TrackedCount {
  void* data;  // null: absent
  bool is_long;
};
inline TrackedCount tracked_count(const std::optional<Tensor>& tracked) {
  const bool is_long = tracked && tracked->scalar_type() == ScalarType::Long;
  if (tracked && !is_long && tracked->scalar_type() != ScalarType::Int) {
    fail("tracked: expected int64 or int32, got another dtype");
  }
  if (tracked) check_shape("tracked", *tracked, "one number", {});
  return {tracked ? const_cast<void*>(tracked->const_data_ptr()) : nullptr, is_long};
}

}  // namespace resnet_fused
