// What conv_bn_act and conv_bn_act_fp8 share: operands, the float64 loop, and the judgement.
//
//     out = act(scale[k] * conv(x, weight)[k] + shift[k] [+ residual_factor residual]) out_factor
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "conv.h"
#include "float8.h"

namespace resnet_fused::driver {

// Of stored numbers; 1 where a number is worth itself.
struct Factors {
  double residual = 1;
  double out = 1;
};

// Beyond `sum_error`, in parts of the products' magnitudes: Hopper is said to keep some 14 bits of
// a sum of e4m3 products, of which the kernel leaves it 128, four steps. See docs/fp8.md.
template <class T>
constexpr double kNarrowSums = 0;
#if !defined(RF_EMULATED)
template <>
inline constexpr double kNarrowSums<Float8> = 4 * 0x1p-13;
#endif

// In: of x, weight and residual.
template <class In, class Out>
class ConvLayer {
 public:
  ConvLayer(const Convolution& of, const Arguments& arguments, Common& common, Factors factors = {})
      : of_(of),
        common_(common),
        factors_(factors),
        has_residual_(arguments.flag("residual")),
        relu_(arguments.choice("act", {"none", "relu"}) == 1),
        x_(elements_of(of.x_size()), common.random, common.values),
        weight_(elements_of(of.weight_size()), common.random, common.values),
        residual_(has_residual_ ? outputs() : 0, common.random, common.values),
        scale_(of.k, common.random, common.values),
        shift_(of.k, common.random, common.values),
        out_(outputs()) {}

  // Sizes, pointers, strides; everything but dtypes.
  RfConvBnAct problem() const {
    auto problem = problem_of<RfConvBnAct>(of_, common_);
    problem.x = x_.device.data();
    problem.weight = weight_.device.data();
    problem.residual = has_residual_ ? residual_.device.data() : nullptr;
    problem.out = out_.device.data();
    problem.scale = scale_.device.data();
    problem.shift = shift_.device.data();
    problem.relu = relu_;
    problem.flow = common_.flow;
    weight_.device.mark_constant("weight");
    scale_.device.mark_constant("scale");
    shift_.device.mark_constant("shift");
    copy_to(problem.residual_stride, of_.out_at().stride);
    copy_to(problem.out_stride, of_.out_at().stride);
    return problem;
  }

  // Runs, checks and times; whether all is right.
  template <class Problem>
  bool run(const Interface<Problem>& op, const Problem& problem, const Arguments& arguments,
           Json& json) {
    const Planned<Problem> planned(op, problem, arguments, json);
    common_.run([&] { planned.launch(); });
    out_.fetch();
    const bool right = report(verdict(), json);
    report_times(time_calls(common_.repeats, [&] { planned.launch(); }), json);
    return right;
  }

 private:
  int64_t outputs() const { return elements_of(of_.out_size()); }

  Verdict verdict() const {
    std::vector<Sum> sums(static_cast<size_t>(outputs()));
    for_each_product(of_, [&](int64_t x, int64_t weight, int64_t out) {
      sums[static_cast<size_t>(out)].add(x_.at(x) * weight_.at(weight));
    });
    const double error = sum_error<In>(common_, of_.c / of_.groups * of_.r * of_.s);
    const int64_t step = of_.out_at().stride[1];
    Verdict verdict;
    for (int64_t place = 0; place < outputs(); ++place) {
      const Sum& sum = sums[static_cast<size_t>(place)];
      const int64_t k = place / step % of_.k;
      const double shortcut = has_residual_ ? factors_.residual * residual_.at(place) : 0;
      const double products = std::fabs(scale_.at(k)) * sum.magnitude;
      const double total = products + std::fabs(shift_.at(k)) + std::fabs(shortcut);
      double expected = scale_.at(k) * sum.value + shift_.at(k) + shortcut;
      if (relu_ && expected < 0) expected = 0;
      verdict.rounded<Out>(out_.at(place), expected * factors_.out,
                           (error * total + kNarrowSums<In> * products) * factors_.out,
                           common_.values);
    }
    return verdict;
  }

  const Convolution& of_;
  const Common& common_;
  Factors factors_;
  bool has_residual_;
  bool relu_;
  Operand<In> x_;
  Operand<In> weight_;
  Operand<In> residual_;
  Operand<float> scale_;
  Operand<float> shift_;
  Operand<Out> out_;
};

}  // namespace resnet_fused::driver
