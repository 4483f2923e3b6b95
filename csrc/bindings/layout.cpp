#include "layout.h"

#include <algorithm>
#include <numeric>

namespace resnet_fused {
namespace {

bool empty(const Layout& layout) {
  return std::any_of(layout.size.begin(), layout.size.end(), [](int64_t s) { return s == 0; });
}

// One past the last byte, relative to data.
int64_t extent(const Layout& layout) {
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) last += (layout.size[d] - 1) * layout.stride[d];
  return (last + 1) * layout.element_bytes;
}

std::array<int, 4> by_stride(const Layout& layout) {
  std::array<int, 4> order;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return layout.stride[a] > layout.stride[b]; });
  return order;
}

// Whether index differences exist that move the address by `distance` elements. The strides are
// nested (overlaps_itself is false), so at each loop only two differences can still lead there.
bool reachable(const Layout& layout, const std::array<int, 4>& order, int at, int64_t distance) {
  if (at == 4) return distance == 0;
  const int64_t size = layout.size[order[at]];
  const int64_t stride = layout.stride[order[at]];
  if (size == 1) return reachable(layout, order, at + 1, distance);
  int64_t floor = distance / stride;
  if (distance % stride != 0 && distance < 0) --floor;
  for (int64_t step = floor; step <= floor + 1; ++step) {
    if (step > -size && step < size && reachable(layout, order, at + 1, distance - step * stride)) {
      return true;
    }
  }
  return false;
}

}  // namespace

bool overlaps_itself(const Layout& layout) {
  if (empty(layout)) return false;
  const std::array<int, 4> order = by_stride(layout);
  int64_t reach = 0;  // how far the inner loops go
  for (int at = 3; at >= 0; --at) {
    const int64_t size = layout.size[order[at]];
    if (size == 1) continue;
    if (layout.stride[order[at]] <= reach) return true;
    reach += (size - 1) * layout.stride[order[at]];
  }
  return false;
}

bool overlap(const Layout& a, const Layout& b) {
  if (empty(a) || empty(b)) return false;
  const auto start_a = reinterpret_cast<uintptr_t>(a.data);
  const auto start_b = reinterpret_cast<uintptr_t>(b.data);
  if (start_a + extent(a) <= start_b || start_b + extent(b) <= start_a) return false;
  const int64_t distance = static_cast<int64_t>(start_b - start_a);
  const bool comparable = a.size == b.size && a.stride == b.stride &&
                          a.element_bytes == b.element_bytes && distance % a.element_bytes == 0 &&
                          !overlaps_itself(a);
  if (!comparable) return true;
  return reachable(a, by_stride(a), 0, distance / a.element_bytes);
}

}  // namespace resnet_fused
