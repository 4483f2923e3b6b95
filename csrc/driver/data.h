// Seeded operands on host and device, and what the results are held to.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../device/bn_act.h"
#include "../device/scalar.h"
#include "device.h"

namespace resnet_fused::driver {

enum class Values { kIntegers, kNormals };  // integers in [-4, 4], or Gaussian noise

// SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }
  double value(Values values) {
    if (values == Values::kIntegers) return static_cast<double>(bits() % 9) - 4;
    return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * M_PI * uniform());
  }

 private:
  uint64_t state_;
};

// u: half the distance of 1 and the next larger number.
template <class T>
constexpr double kUnitRoundoff = 0x1p-53;
template <>
constexpr double kUnitRoundoff<float> = 0x1p-24;
template <>
constexpr double kUnitRoundoff<Float16> = 0x1p-11;
template <>
constexpr double kUnitRoundoff<BFloat16> = 0x1p-8;

// Half of the smallest subnormal: the error of rounding a subnormal to nearest.
template <class T>
constexpr double kHalfSubnormal = 0;  // of double: none that it can hold
template <>
constexpr double kHalfSubnormal<float> = 0x1p-150;
template <>
constexpr double kHalfSubnormal<Float16> = 0x1p-25;
template <>
constexpr double kHalfSubnormal<BFloat16> = 0x1p-134;

// Results beyond it are it.
template <class T>
constexpr double kSaturation = std::numeric_limits<double>::infinity();

// The nearest T of a double whose float is exact, as the exact tier's are.
template <class T>
T round_to(double value) {
  return narrow<T>(static_cast<Compute<T>>(value));
}

template <class T>
double to_double(T value) {
  return static_cast<double>(widen(value));
}

// A tensor on the host and its copy on the device.
template <class T>
struct Operand {
  std::vector<T> host;
  Buffer device;

  Operand(int64_t count, Random& random, Values values)
      : host(static_cast<size_t>(count)), device(host.size() * sizeof(T)) {
    for (T& element : host) element = round_to<T>(random.value(values));
    device.copy_from(host.data());
  }
  // Filled with NaN: an output that is not written shows.
  explicit Operand(int64_t count)
      : host(static_cast<size_t>(count), round_to<T>(std::numeric_limits<double>::quiet_NaN())),
        device(host.size() * sizeof(T)) {
    device.copy_from(host.data());
  }
  void fetch() { device.copy_to(host.data()); }
  double at(int64_t index) const { return to_double(host[static_cast<size_t>(index)]); }
};

// How results compare with float64.
struct Verdict {
  int64_t elements = 0;
  int64_t wrong = 0;
  double worst = 0;  // largest error in units of the bound; on integers, largest error

  // The bound tier: |y - expected| <= bound. A NaN is wrong.
  void within(double y, double expected, double bound) {
    ++elements;
    const double error = std::fabs(y - expected);
    wrong += !(error <= bound);
    if (error != 0) keep(error / bound);
  }
  // The exact tier: bit for bit, the sign of a zero aside.
  void equal(double y, double expected) {
    ++elements;
    wrong += !(y == expected);
    keep(y == expected ? 0 : std::fabs(y - expected));  // infinities are equal
  }
  // What is rounded once, to Out, behind sums that may be off by `error`; of integers by nothing.
  template <class Out>
  void rounded(double y, double expected, double error, Values values) {
    if (values == Values::kIntegers) return equal(y, to_double(round_to<Out>(expected)));
    constexpr double kMost = kSaturation<Out>, u = kUnitRoundoff<Out>;
    if (std::fabs(expected) >= kMost && error < u / 2 * kMost) {
      return within(y, std::copysign(kMost, expected), 0);
    }
    const double nearest = std::fmin(std::fmax(expected, -kMost), kMost);
    within(y, nearest, u * std::fabs(nearest) + kHalfSubnormal<Out> + error * (1 + u));
  }

 private:
  void keep(double error) {
    if (std::isnan(error) || error > worst) worst = error;  // a NaN stays
  }
};

// Calls `body` with a value of the storage type that `dtype` names.
template <class F>
auto with_type(DataType dtype, F body) {
  switch (dtype) {
    case DataType::kFloat32:
      return body(float{});
    case DataType::kFloat64:
      return body(double{});
    case DataType::kFloat16:
      return body(Float16{});
    case DataType::kBFloat16:
      break;
  }
  return body(BFloat16{});
}

}  // namespace resnet_fused::driver
