// What is added to a gradient by a stride of its own: every so many rows and columns have some.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "divide.h"

namespace resnet_fused {

// Whether something is added to a pixel; `pixel` becomes the addend's own.
RF_DEVICE bool to_addend(Pixel& pixel, const Divisor& step) {
  const auto p = static_cast<int32_t>(quotient(static_cast<uint32_t>(pixel.p), step));
  const auto q = static_cast<int32_t>(quotient(static_cast<uint32_t>(pixel.q), step));
  const auto each = static_cast<int32_t>(step.value);
  const bool found = p * each == pixel.p && q * each == pixel.q;
  pixel.p = p;
  pixel.q = q;
  return found;
}

}  // namespace resnet_fused
