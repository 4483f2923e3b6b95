// What conv_chain and conv_chain_fp8 share: operands, the run and its judgement.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../launch/conv_chain.h"
#include "conv_judge.h"

namespace resnet_fused::driver {

// All convolutions are 1x1, but the one in front, which reads --front channels and makes --c; --c
// is what the first 1x1 reads, --k is out, --stride the projection's.
struct ChainSizes {
  int64_t n, c, h, w, k, next, projected, stride, out_stride, front;
  bool channels_last;

  explicit ChainSizes(const Arguments& arguments)
      : n(arguments.integer("n", 0)),
        c(arguments.integer("c", 1)),
        h(arguments.integer("h", 1)),
        w(arguments.integer("w", 1)),
        k(arguments.integer("k", 1)),
        next(arguments.integer("next", 0)),
        projected(arguments.integer("projected", 0)),
        stride(arguments.integer("stride", 1)),
        out_stride(arguments.integer("out-stride", 1)),
        front(arguments.integer("front", 0)),
        channels_last(arguments.choice("layout", {"nchw", "nhwc"}) == 1) {}

  Size pixels(int64_t channels) const { return {n, channels, h, w}; }
  Size input() const { return pixels(front > 0 ? front : c); }
  Size source() const { return {n, projected, (h - 1) * stride + 1, (w - 1) * stride + 1}; }
  Size stored() const {
    return {n, k, (h + out_stride - 1) / out_stride, (w + out_stride - 1) / out_stride};
  }
};

// A convolution's filters [count][taps][channels] and what becomes of its sums.
template <class T>
struct Filters {
  int64_t channels;
  Operand<T> weight;
  Operand<float> scale;
  Operand<float> shift;

  // channels: with the taps.
  Filters(int64_t count, int64_t channels, Common& common)
      : channels(channels),
        weight(count * channels, common.random, common.values),
        scale(count, common.random, common.values),
        shift(count, common.random, common.values) {
    weight.device.mark_constant("weight");
    scale.device.mark_constant("scale");
    shift.device.mark_constant("shift");
  }

  // scale * sum + shift of filter k, read(c) being what it reads; and how far it may be off.
  template <class Read>
  Sum of(int64_t k, const Common& common, const Read& read) const {
    Sum sum;
    for (int64_t c = 0; c < channels; ++c) sum.add(read(c) * weight.at(k * channels + c));
    const double products = std::fabs(scale.at(k)) * sum.magnitude;
    return {scale.at(k) * sum.value + shift.at(k),
            sum_error<T>(common, channels) * (products + std::fabs(shift.at(k))) +
                kNarrowSums<T> * products};
  }
};

constexpr int64_t kChainSide = 3;  // of the filters in front
constexpr int64_t kChainTaps = kChainSide * kChainSide;

// Of stored numbers: what a 1 of the shortcut is worth, and one over that, of out and of next too;
// 1 where a number is worth itself.
struct ChainFactors {
  double residual = 1;
  double projection = 1;
  double out = 1;
  double next = 1;
};

// What out or next must be, and how far from it is right before it is rounded.
struct Expected {
  double value;
  double off;
};

// How far what was rounded may be from what was to be expected if nobody has seen it: both are
// rounded.
template <class T>
double unseen_error(const Expected& of) {
  const double size = std::fmin(std::fabs(of.value), kSaturation<T>);
  return 2 * (kUnitRoundoff<T> * size + of.off + kHalfSubnormal<T>);
}

template <class T>
class ChainLayer {
  // Beside float32 sums: convolutions one after the other store a projected shortcut in T.
  static constexpr bool kRoundsShortcut = std::is_same_v<T, Float8>;

 public:
  ChainLayer(const ChainSizes& of, Common& common, ChainFactors factors = {})
      : of_(of),
        common_(common),
        factors_(factors),
        x_(elements_of(of.input()), common.random, common.values),
        residual_(of.projected > 0 ? 0 : elements_of(of.pixels(of.k)), common.random,
                  common.values),
        source_(elements_of(of.source()), common.random, common.values),
        first_(of.k, of.c, common),
        projection_(of.projected > 0 ? of.k : 0, of.projected, common),
        next_(of.next, of.k, common),
        front_(of.front > 0 ? of.c : 0, kChainTaps * of.front, common),
        out_(elements_of(of.stored())),
        following_(elements_of(of.pixels(of.next))) {}

  // Everything but the dtype.
  RfConvChain problem(const Arguments& arguments) {
    RfConvChain problem{};
    problem.x = x_.device.data();
    problem.weight = first_.weight.device.data();
    problem.residual = residual_.device.data();
    problem.projected = source_.device.data();
    problem.projection_weight = projection_.weight.device.data();
    problem.next_weight = next_.weight.device.data();
    problem.out = out_.device.data();
    problem.following = following_.device.data();
    problem.scale = first_.scale.device.data();
    problem.shift = first_.shift.device.data();
    problem.projection_scale = projection_.scale.device.data();
    problem.projection_shift = projection_.shift.device.data();
    problem.next_scale = next_.scale.device.data();
    problem.next_shift = next_.shift.device.data();
    problem.front_weight = front_.weight.device.data();
    problem.front_scale = front_.scale.device.data();
    problem.front_shift = front_.shift.device.data();
    problem.reverse = arguments.flag("reverse");
    problem.flow = common_.flow;
    problem.projects = of_.projected > 0;
    problem.out_stride = of_.out_stride;
    problem.projection_stride = of_.stride;
    problem.channels = of_.k;
    problem.projected_channels = of_.projected;
    problem.next_channels = of_.next;
    problem.front_channels = of_.front > 0 ? of_.c : 0;
    copy_to(problem.x_size, of_.input());
    const auto strides = [&](int64_t (&to)[4], const Size& size) {
      copy_to(to, Layout(size, of_.channels_last).stride);
    };
    strides(problem.x_stride, of_.input());
    strides(problem.residual_stride, of_.pixels(of_.k));
    strides(problem.projected_stride, of_.source());
    strides(problem.out_strides, of_.stored());
    strides(problem.following_stride, of_.pixels(of_.next));
    strides(problem.weight_stride, {of_.k, of_.c, 1, 1});
    strides(problem.projection_weight_stride, {of_.k, of_.projected, 1, 1});
    strides(problem.next_weight_stride, {of_.next, of_.k, 1, 1});
    strides(problem.front_weight_stride, {of_.c, of_.front, kChainSide, kChainSide});
    return problem;
  }

  // Runs, checks and times; whether all is right.
  template <class Problem>
  bool run(const Interface<Problem>& op, const Problem& problem, const Arguments& arguments,
           Json& json) {
    const Planned<Problem> planned(op, problem, arguments, json);
    common_.run([&] { planned.launch(); });
    out_.fetch();
    following_.fetch();
    const Layout next_at(of_.pixels(of_.next), true);
    std::vector<double> row(static_cast<size_t>(of_.k)), slack(row.size());
    std::vector<Expected> inner(static_cast<size_t>(of_.c));
    Verdict verdict;
    for (int64_t n = 0; n < of_.n; ++n) {
      for (int64_t p = 0; p < of_.h; ++p) {
        for (int64_t q = 0; q < of_.w; ++q) {
          for (int64_t c = 0; c < of_.c; ++c) inner[static_cast<size_t>(c)] = read(n, c, p, q);
          for (int64_t k = 0; k < of_.k; ++k) check_out(verdict, n, k, p, q, inner, row, slack);
          for (int64_t m = 0; m < of_.next; ++m) {
            check_next(verdict, m, next_at.at(n, m, p, q), row, slack);
          }
        }
      }
    }
    const bool right = report(verdict, json);
    report_times(time_calls(common_.repeats, [&] { planned.launch(); }), json);
    return right;
  }

 private:
  // What the first 1x1 convolution reads of a pixel, and how far it may be off: x, or what the
  // convolution in front makes of it, rounded.
  Expected read(int64_t n, int64_t c, int64_t p, int64_t q) const {
    const Layout x_at(of_.input(), true);
    if (of_.front == 0) return {x_.at(x_at.at(n, c, p, q)), 0};
    const Sum sum = front_.of(c, common_, [&](int64_t i) {
      const int64_t tap = i / of_.front;
      const int64_t row = p + tap / kChainSide - 1, column = q + tap % kChainSide - 1;
      const bool inside = row >= 0 && row < of_.h && column >= 0 && column < of_.w;
      return inside ? x_.at(x_at.at(n, i % of_.front, row, column)) : 0.0;
    });
    const Expected made{std::max(sum.value, 0.0), sum.magnitude};
    return {to_double(round_to<T>(made.value)), unseen_error<T>(made)};
  }

  Expected expected_out(int64_t n, int64_t k, int64_t p, int64_t q,
                        const std::vector<Expected>& inner) const {
    const Layout residual_at(of_.pixels(of_.k), true);
    Sum sum = first_.of(k, common_, [&](int64_t c) { return inner[static_cast<size_t>(c)].value; });
    double passed = 0;
    for (int64_t c = 0; c < of_.c; ++c) {
      passed += std::fabs(first_.weight.at(k * of_.c + c)) * inner[static_cast<size_t>(c)].off;
    }
    sum.magnitude += std::fabs(first_.scale.at(k)) * passed;
    const Expected shortcut = of_.projected > 0
                                  ? projected(n, k, p, q)
                                  : Expected{residual_.at(residual_at.at(n, k, p, q)), 0};
    const double added = factors_.residual * shortcut.value;
    const double value = std::max(sum.value + added, 0.0);
    const double off =
        sum.magnitude + factors_.residual * shortcut.off + 0x1p-23 * std::fabs(added);
    return {value * factors_.out, off * factors_.out};
  }

  // A stored shortcut's number that a projection makes, or would.
  Expected projected(int64_t n, int64_t k, int64_t p, int64_t q) const {
    const Layout source_at(of_.source(), true);
    const Sum sum = projection_.of(k, common_, [&](int64_t c) {
      return source_.at(source_at.at(n, c, p * of_.stride, q * of_.stride));
    });
    const Expected made{sum.value * factors_.projection, sum.magnitude * factors_.projection};
    if constexpr (!kRoundsShortcut) return made;
    const double off = common_.values == Values::kIntegers ? 0 : unseen_error<T>(made);
    return {to_double(round_to<T>(made.value)), off};
  }

  void compare(Verdict& verdict, double got, const Expected& expected) const {
    verdict.rounded<T>(got, expected.value, expected.off, common_.values);
  }

  // Checks an element of out if it is stored; what the next convolution reads goes into `row`, and
  // how far it may be off where nobody has seen it.
  void check_out(Verdict& verdict, int64_t n, int64_t k, int64_t p, int64_t q,
                 const std::vector<Expected>& inner, std::vector<double>& row,
                 std::vector<double>& slack) const {
    const Expected expected = expected_out(n, k, p, q, inner);
    const auto at = static_cast<size_t>(k);
    const int64_t step = of_.out_stride;
    row[at] = to_double(round_to<T>(expected.value));
    slack[at] = unseen_error<T>(expected);
    if (p % step != 0 || q % step != 0) return;
    const double got = out_.at(Layout(of_.stored(), true).at(n, k, p / step, q / step));
    compare(verdict, got, expected);
    row[at] = got;
    slack[at] = 0;
  }

  void check_next(Verdict& verdict, int64_t m, int64_t place, const std::vector<double>& row,
                  const std::vector<double>& slack) const {
    const Sum sum = next_.of(m, common_, [&](int64_t c) { return row[static_cast<size_t>(c)]; });
    double passed = 0;
    for (int64_t c = 0; c < of_.k; ++c) {
      passed += std::fabs(next_.weight.at(m * of_.k + c)) * slack[static_cast<size_t>(c)];
    }
    passed *= std::fabs(next_.scale.at(m));
    const double value = std::max(sum.value, 0.0);
    compare(verdict, following_.at(place),
            {value * factors_.next, (sum.magnitude + passed) * factors_.next});
  }

  const ChainSizes& of_;
  Common& common_;
  ChainFactors factors_;
  Operand<T> x_, residual_, source_;
  Filters<T> first_, projection_, next_, front_;
  Operand<T> out_, following_;
};

}  // namespace resnet_fused::driver
