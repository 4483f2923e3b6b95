#include "conv.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnAct> kOp = {"conv_bn_act", rf_conv_bn_act_configurations,
                                        rf_conv_bn_act_configuration, rf_conv_bn_act_plan,
                                        rf_conv_bn_act_cuda};

template <class T>
bool run(const Convolution& of, const Arguments& arguments, Common& common, Json& json) {
  const bool has_residual = arguments.flag("residual");
  const bool relu = arguments.choice("act", {"none", "relu"}) == 1;
  const int64_t outputs = elements_of(of.out_size());
  const Operand<T> x(elements_of(of.x_size()), common.random, common.values);
  const Operand<T> weight(elements_of(of.weight_size()), common.random, common.values);
  const Operand<T> residual(has_residual ? outputs : 0, common.random, common.values);
  const Operand<float> scale(of.k, common.random, common.values);
  const Operand<float> shift(of.k, common.random, common.values);
  Operand<T> out(outputs);

  const Layout out_at = of.out_at();
  auto problem = problem_of<RfConvBnAct>(of, common);
  problem.x = x.device.data();
  problem.weight = weight.device.data();
  problem.residual = has_residual ? residual.device.data() : nullptr;
  problem.out = out.device.data();
  problem.scale = scale.device.data();
  problem.shift = shift.device.data();
  problem.relu = relu;
  problem.flow = common.flow;
  weight.device.mark_constant("weight");
  scale.device.mark_constant("scale");
  shift.device.mark_constant("shift");
  copy_to(problem.residual_stride, out_at.stride);
  copy_to(problem.out_stride, out_at.stride);
  const Planned<RfConvBnAct> planned(kOp, problem, arguments, json);
  common.run([&] { planned.launch(); });
  out.fetch();

  Verdict verdict;
  judge<T>(of, common, {x, weight, has_residual ? &residual : nullptr, scale, shift, relu}, out,
           common.values == Values::kIntegers, verdict);
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

}  // namespace

bool run_conv_bn_act(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  return with_conv_type(kOp.name, common.dtype,
                        [&]<class T>() { return run<T>(of, arguments, common, json); });
}

}  // namespace resnet_fused::driver
