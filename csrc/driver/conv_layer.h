// What conv_bn_act and conv_bn_act_fp8 share: operands, the run and its judgement.
#pragma once

#include <cstdint>

#include "conv_judge.h"

namespace resnet_fused::driver {

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
    Verdict verdict;
    judge<In, Out>(
        of_, common_,
        {x_, weight_, has_residual_ ? &residual_ : nullptr, scale_, shift_, relu_, factors_}, out_,
        common_.values, verdict);
    const bool right = report(verdict, json);
    report_times(time_calls(common_.repeats, [&] { planned.launch(); }), json);
    return right;
  }

 private:
  int64_t outputs() const { return elements_of(of_.out_size()); }

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
