// What the driver's convolutions share: their sizes, the products that they sum, how far sums may
// be off, and the reading of a plan.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "../launch/conv_bn_act.h"
#include "op.h"

namespace resnet_fused::driver {

using Size = std::array<int64_t, 4>;

inline int64_t elements_of(const Size& size) { return size[0] * size[1] * size[2] * size[3]; }

// Strides of [a, b, c, d], dense: b last (NHWC) or d last (NCHW).
struct Layout {
  Size stride;

  Layout(const Size& size, bool channels_last);
  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3];
  }
};

// A convolution's sizes, the same in both directions, and the layout of all of its tensors.
struct Convolution {
  int64_t n, c, h, w, k, r, s, stride, padding, dilation, groups;
  bool channels_last;

  // Reads the options; throws UsageError where there is no such convolution.
  explicit Convolution(const Arguments& arguments);

  int64_t p() const { return extent(h, r); }
  int64_t q() const { return extent(w, s); }
  Size x_size() const { return {n, c, h, w}; }
  Size weight_size() const { return {k, c / groups, r, s}; }
  Size out_size() const { return {n, k, p(), q()}; }
  Layout x_at() const { return {x_size(), channels_last}; }
  Layout weight_at() const { return {weight_size(), channels_last}; }
  Layout out_at() const { return {out_size(), channels_last}; }

 private:
  int64_t extent(int64_t size, int64_t taps) const {
    const int64_t room = size + 2 * padding - dilation * (taps - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
};

// Calls body(x, weight, out) with the places of the operands of each product: out sums x * weight.
template <class F>
void for_each_product(const Convolution& of, F body) {
  const Layout x_at = of.x_at(), weight_at = of.weight_at(), out_at = of.out_at();
  const int64_t channels = of.c / of.groups;
  const auto along_channels = [&](int64_t n, int64_t k, int64_t r, int64_t s, int64_t row,
                                  int64_t column, int64_t out) {
    const int64_t first = k / (of.k / of.groups) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      body(x_at.at(n, first + c, row, column), weight_at.at(k, c, r, s), out);
    }
  };
  const auto over_taps = [&](int64_t n, int64_t k, int64_t p, int64_t q) {
    const int64_t out = out_at.at(n, k, p, q);
    for (int64_t r = 0; r < of.r; ++r) {
      const int64_t row = p * of.stride - of.padding + r * of.dilation;
      if (row < 0 || row >= of.h) continue;
      for (int64_t s = 0; s < of.s; ++s) {
        const int64_t column = q * of.stride - of.padding + s * of.dilation;
        if (column >= 0 && column < of.w) along_channels(n, k, r, s, row, column, out);
      }
    }
  };
  for (int64_t n = 0; n < of.n; ++n) {
    for (int64_t k = 0; k < of.k; ++k) {
      for (int64_t p = 0; p < of.p(); ++p) {
        for (int64_t q = 0; q < of.q(); ++q) over_taps(n, k, p, q);
      }
    }
  }
}

// A sum and that of its terms' magnitudes.
struct Sum {
  double value = 0;
  double magnitude = 0;

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

// The sums of a convolution in `out_at`'s order. X and W: of values by their places.
template <class X, class W>
std::vector<Sum> convolve(const Convolution& of, const X& x, const W& weight) {
  std::vector<Sum> sums(static_cast<size_t>(elements_of(of.out_size())));
  for_each_product(of, [&](int64_t x_place, int64_t weight_place, int64_t out_place) {
    sums[static_cast<size_t>(out_place)].add(x.at(x_place) * weight.at(weight_place));
  });
  return sums;
}

// How far a sum in float32 may be off, in parts of the sum of its terms' magnitudes, that is
// rounded as often as a random walk of so many steps errs.
inline double walk_error(double steps) { return (steps + 8) * 0x1p-23; }

// Of a sum of `depth` products: beside that, for TF32's operands 2 * 2^-11. Sums that are rounded
// err like a random walk; units that cut them err once a step of theirs, 32 bytes of an operand.
template <class T>
double sum_error(const Common& common, int64_t depth) {
  constexpr bool kTf32 = sizeof(T) == 4;
  const auto length = static_cast<double>(depth);
  const double terms = common.toward_zero ? length * sizeof(T) / 32 : std::sqrt(length);
  return walk_error(terms) + (kTf32 ? 0x1p-10 : 0);
}

template <class Source, class Target, size_t kCount>
void copy_to(Target (&to)[kCount], const Source& from) {
  std::copy(from.begin(), from.end(), to);
}

// RfConvBnAct or RfConvGradient, with what they have in common.
template <class Problem>
Problem problem_of(const Convolution& of, const Common& common) {
  Problem problem{};
  problem.dtype = static_cast<int32_t>(common.dtype);
  problem.allow_tf32 = 1;
  problem.groups = static_cast<int32_t>(of.groups);
  copy_to(problem.x_size, of.x_size());
  copy_to(problem.weight_size, of.weight_size());
  copy_to(problem.x_stride, of.x_at().stride);
  copy_to(problem.weight_stride, of.weight_at().stride);
  std::fill_n(problem.stride, 2, of.stride);
  std::fill_n(problem.padding, 2, of.padding);
  std::fill_n(problem.dilation, 2, of.dilation);
  return problem;
}

// The C interface of one op.
template <class Problem>
struct Interface {
  const char* name;
  int32_t (*configurations)();
  const RfConvConfiguration* (*configuration)(int32_t);
  int32_t (*plan)(const Problem*, const RfGpu*, int32_t, int32_t, RfConvPlan*, char*, size_t);
  int (*run)(const Problem*, const RfConvPlan*, void*, void*);
};

// What the plan depends on: the GPU at hand, or an H200 for the emulator.
RfGpu this_gpu();

// The index of --configuration, -1 for auto; throws UsageError for a name that there is not.
int32_t configuration_of(const Arguments& arguments, int32_t count,
                         const RfConvConfiguration* (*configuration)(int32_t));

// A problem with the plan that --configuration and --splits ask for, and its workspace.
template <class Problem>
class Planned {
 public:
  // Adds "plan" to the record; throws UsageError where there is none.
  Planned(const Interface<Problem>& op, const Problem& problem, const Arguments& arguments,
          Json& json)
      : op_(op), problem_(problem), plan_(plan(op, problem, arguments, json)) {
    // In any state: NaN, and no count that is right.
    const std::vector<uint8_t> poison(static_cast<size_t>(plan_.workspace_bytes), 0xFF);
    workspace_.copy_from(poison.data());
  }

  // Whether launch() does anything.
  bool launches() const { return plan_.launches > 0; }
  void launch() const { check(op_.run(&problem_, &plan_, workspace_.data(), nullptr), op_.name); }

 private:
  static RfConvPlan plan(const Interface<Problem>& op, const Problem& problem,
                         const Arguments& arguments, Json& json) {
    const RfGpu gpu = this_gpu();
    const int32_t configuration =
        configuration_of(arguments, op.configurations(), op.configuration);
    const auto splits = static_cast<int32_t>(
        std::min<int64_t>(arguments.integer("splits", 0), std::numeric_limits<int32_t>::max()));
    RfConvPlan plan;
    char why[512] = "";
    if (op.plan(&problem, &gpu, configuration, splits, &plan, why, sizeof why) != 0) {
      throw UsageError(std::string("no plan: ") + why);
    }
    json.add("plan", why);
    return plan;
  }

  const Interface<Problem>& op_;
  Problem problem_;
  RfConvPlan plan_;
  Buffer workspace_{static_cast<size_t>(plan_.workspace_bytes)};
};

// Calls body.operator()<T>() with the storage type T; throws UsageError for float64.
template <class F>
bool with_conv_type(const char* op, DataType dtype, F body) {
  return with_type(dtype, [&]<class T>(T) -> bool {
    if constexpr (std::is_same_v<T, double>) {
      throw UsageError("--dtype is 'float64'; " + std::string(op) +
                       " serves float32, float16 and bfloat16");
    } else {
      return body.template operator()<T>();
    }
  });
}

}  // namespace resnet_fused::driver
