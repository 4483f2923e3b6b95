// What the driver's ops of training share: images, a BatchNorm's per-channel values, what is read
// through them, and the judgement of sums over pixels.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "conv.h"

namespace resnet_fused::driver {

// Errors of an fma and a sum in float32, in parts of their terms' magnitudes.
constexpr double kAffineError = 4 * kUnitRoundoff<float>;

// Images of one size and layout, all of a call.
struct Images {
  Size size;
  bool channels_last;

  explicit Images(const Arguments& arguments)
      : size{arguments.integer("n", 0), arguments.integer("c", 1), arguments.integer("h", 1),
             arguments.integer("w", 1)},
        channels_last(arguments.choice("layout", {"nchw", "nhwc"}) == 1) {}

  int64_t channels() const { return size[1]; }
  int64_t elements() const { return elements_of(size); }
  Layout at() const { return {size, channels_last}; }
  int64_t channel(int64_t place) const { return place / at().stride[1] % size[1]; }
};

// A BatchNorm's [4, C]: scale, shift, mean, invstd.
struct Norm : Operand<float> {
  int64_t channels;

  Norm(int64_t channels, Common& common)
      : Operand<float>(4 * channels, common.random, common.values), channels(channels) {}
  double scale(int64_t c) const { return at(c); }
  double shift(int64_t c) const { return at(channels + c); }
  double mean(int64_t c) const { return at(2 * channels + c); }
  // y as it is read through the BatchNorm, unrounded.
  void add_to(Sum& sum, int64_t c, double y) const {
    sum.add(scale(c) * y);
    sum.add(shift(c));
  }
};

// y through a BatchNorm, rounded to T: where it is not above 0, a ReLU's gradient does not pass.
template <class T>
double normalised(const Norm& norm, int64_t channel, double y) {
  return to_double(round_to<T>(norm.scale(channel) * y + norm.shift(channel)));
}

// What a convolution multiplies where x is read through a BatchNorm: relu(scale x + shift), rounded
// to T; without `norm` x itself.
template <class T>
class NormedRead {
 public:
  // step: of a channel in x.
  NormedRead(const Operand<T>& x, const Norm* norm, int64_t step) : values_(x.host.size()) {
    for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); ++i) {
      double value = x.at(i);
      if (norm != nullptr) value = normalised<T>(*norm, i / step % norm->channels, value);
      values_[static_cast<size_t>(i)] = norm != nullptr && !(value > 0) ? 0 : value;
    }
  }
  double at(int64_t place) const { return values_[static_cast<size_t>(place)]; }

 private:
  std::vector<double> values_;
};

// A BatchNorm's raw output with its values.
template <class T>
struct Branch {
  const Operand<T>& raw;
  const Norm& norm;
};

// Sums of dz, and of dz (raw - mean) of each branch, [1 + branches, C]: of dz as it was stored, all
// in float32.
template <class T>
void judge_sums(const Images& of, const Operand<T>& dz, const std::vector<Branch<T>>& branches,
                const Operand<float>& sums, Values values, Verdict& verdict) {
  const int64_t channels = of.channels(), rows = 1 + static_cast<int64_t>(branches.size());
  std::vector<Sum> expected(static_cast<size_t>(rows * channels));
  for (int64_t i = 0; i < of.elements(); ++i) {
    const int64_t c = of.channel(i);
    expected[static_cast<size_t>(c)].add(dz.at(i));
    for (int64_t row = 1; row < rows; ++row) {
      const Branch<T>& branch = branches[static_cast<size_t>(row - 1)];
      expected[static_cast<size_t>(row * channels + c)].add(
          dz.at(i) * (branch.raw.at(i) - branch.norm.mean(c)));
    }
  }
  const auto pixels = static_cast<double>(of.elements() / channels);
  const double error = walk_error(std::sqrt(pixels));
  for (int64_t i = 0; i < rows * channels; ++i) {
    const Sum& sum = expected[static_cast<size_t>(i)];
    if (values == Values::kIntegers) {
      verdict.equal(sums.at(i), sum.value);
    } else {
      verdict.within(sums.at(i), sum.value, error * sum.magnitude + kHalfSubnormal<float>);
    }
  }
}

}  // namespace resnet_fused::driver
