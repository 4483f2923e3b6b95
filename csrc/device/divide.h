// Division by a number that is known when a kernel is launched: one multiplication and a shift.
#pragma once

#include <cstdint>

#include "portable.h"

namespace resnet_fused {

// With l = ceil(log2(value)) and multiplier = ceil(2^(31 + l) / value), the product of the
// multiplier and n exceeds 2^(31 + l) n / value by less than 2^(31 + l) / value for every
// n < 2^31, so that its top bits are the quotient (Granlund and Montgomery, "Division by Invariant
// Integers using Multiplication", 1994).
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;
};

// value: 1 .. 2^31 - 1.
inline Divisor make_divisor(int32_t value) {
  const auto divisor = static_cast<uint32_t>(value);
  uint32_t log = 0;
  while ((uint64_t{1} << log) < divisor) ++log;
  const uint32_t shift = 31 + log;
  const uint64_t multiplier = ((uint64_t{1} << shift) + divisor - 1) / divisor;
  return Divisor{divisor, static_cast<uint32_t>(multiplier), shift};
}

// n / divisor, for n below 2^31.
RF_HOST_DEVICE uint32_t quotient(uint32_t n, const Divisor& divisor) {
  return static_cast<uint32_t>(static_cast<uint64_t>(n) * divisor.multiplier >> divisor.shift);
}

}  // namespace resnet_fused
