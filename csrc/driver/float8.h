// e4m3 on the host, by its definition ("FP8 Formats for Deep Learning", Micikevicius et al., 2022,
// section 3): what the conversions of csrc/device are held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "data.h"

namespace resnet_fused::driver {

struct Float8 {
  uint8_t bits;
};

// 2^-9, the distance of the smallest numbers, up to 2^-6; then an eighth of the power of two below.
constexpr int kFloat8Steps = 8;
constexpr int kFloat8Finest = -9;
constexpr uint8_t kFloat8Nan = 0x7F;

template <>
inline constexpr double kUnitRoundoff<Float8> = 0x1p-4;
template <>
inline constexpr double kHalfSubnormal<Float8> = 0x1p-10;
template <>
inline constexpr double kSaturation<Float8> = 448;

// To nearest, ties to even, saturating; NaN stays.
template <>
inline Float8 round_to<Float8>(double value) {
  if (std::isnan(value)) return {kFloat8Nan};
  const double size = std::min(std::fabs(value), kSaturation<Float8>);
  const int step = size < 0x1p-6 ? kFloat8Finest : std::ilogb(size) - 3;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  const int magnitude = (step - kFloat8Finest) * kFloat8Steps + units;
  return {static_cast<uint8_t>(magnitude | (std::signbit(value) ? 0x80 : 0))};
}

template <>
inline double to_double<Float8>(Float8 value) {
  const int magnitude = value.bits & 0x7F;
  if (magnitude == kFloat8Nan) return std::numeric_limits<double>::quiet_NaN();
  const int exponent = std::max(magnitude / kFloat8Steps, 1);
  const int units = magnitude - (exponent - 1) * kFloat8Steps;
  const double size = std::ldexp(units, exponent - 1 + kFloat8Finest);
  return value.bits >= 0x80 ? -size : size;
}

}  // namespace resnet_fused::driver
