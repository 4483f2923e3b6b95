// Questions about where strided tensors lie in memory. Plain integers, no tensor type.
#pragma once

#include <array>
#include <cstdint>

namespace resnet_fused {

// A four-dimensional strided range of memory; strides count elements and are not negative.
struct Layout {
  const char* data;
  int64_t element_bytes;
  std::array<int64_t, 4> size;
  std::array<int64_t, 4> stride;
};

// Whether two different indices reach the same element (an expanded tensor, for one).
// May say true of an exotic layout that has none; never false of one that has.
bool overlaps_itself(const Layout& layout);

// Whether a byte may belong to both. Exact where the strides agree, as for two slices of one
// tensor; where they differ, true whenever the address ranges meet.
bool overlap(const Layout& a, const Layout& b);

}  // namespace resnet_fused
