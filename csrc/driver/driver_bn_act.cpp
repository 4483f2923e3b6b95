#include "../launch/bn_act.h"
#include "op.h"

namespace resnet_fused::driver {
namespace {

struct Problem {
  int64_t n, c, h, w;
  bool residual;
  bool relu;
  bool channels_last;

  int64_t elements() const { return n * c * h * w; }
  int64_t channel(int64_t index) const { return channels_last ? index % c : index / (h * w) % c; }
};

template <class T>
bool run(const Problem& problem, Common& common, Json& json) {
  using C = Compute<T>;
  const int64_t elements = problem.elements();
  const Operand<T> x(elements, common.random, common.values);
  const Operand<T> residual(problem.residual ? elements : 0, common.random, common.values);
  const Operand<C> scale(problem.c, common.random, common.values);
  const Operand<C> shift(problem.c, common.random, common.values);
  Operand<T> out(elements);

  RfBnActTensors tensors{};
  tensors.x = x.device.data();
  tensors.residual = problem.residual ? residual.device.data() : nullptr;
  tensors.out = out.device.data();
  tensors.scale = scale.device.data();
  tensors.shift = shift.device.data();
  tensors.dtype = static_cast<int32_t>(common.dtype);
  tensors.relu = problem.relu;
  const int64_t size[4] = {problem.n, problem.c, problem.h, problem.w};
  const int64_t image = problem.c * problem.h * problem.w;
  const int64_t nchw[4] = {image, problem.h * problem.w, problem.w, 1};
  const int64_t nhwc[4] = {image, 1, problem.w * problem.c, problem.c};
  for (int d = 0; d < 4; ++d) {
    tensors.size[d] = size[d];
    tensors.x_stride[d] = tensors.residual_stride[d] = tensors.out_stride[d] =
        problem.channels_last ? nhwc[d] : nchw[d];
  }
  BnActLoop loop;
  rf_bn_act_plan(&tensors, &loop);
  scale.device.mark_constant("scale");
  shift.device.mark_constant("shift");
  const auto launch = [&] { check(rf_bn_act_cuda(&loop, &common.flow, nullptr), "bn_act"); };
  common.run(launch);
  out.fetch();

  Verdict verdict;
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t channel = problem.channel(i);
    const double shortcut = problem.residual ? residual.at(i) : 0;
    double expected = scale.at(channel) * x.at(i) + shift.at(channel) + shortcut;
    const double magnitude =
        std::fabs(scale.at(channel) * x.at(i)) + std::fabs(shift.at(channel)) + std::fabs(shortcut);
    if (problem.relu && expected < 0) expected = 0;
    if (common.values == Values::kIntegers) {
      verdict.equal(out.at(i), to_double(round_to<T>(expected)));
    } else {
      // One fma, one sum, one rounding.
      verdict.within(out.at(i), expected,
                     kUnitRoundoff<T> * std::fabs(expected) + 4 * kUnitRoundoff<C> * magnitude);
    }
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, launch), json);
  return right;
}

}  // namespace

bool run_bn_act(const Arguments& arguments, Common& common, Json& json) {
  const Problem problem{arguments.integer("n", 0),
                        arguments.integer("c", 1),
                        arguments.integer("h", 1),
                        arguments.integer("w", 1),
                        arguments.flag("residual"),
                        arguments.choice("act", {"none", "relu"}) == 1,
                        arguments.choice("layout", {"nchw", "nhwc"}) == 1};
  return with_type(common.dtype, [&]<class T>(T) { return run<T>(problem, common, json); });
}

}  // namespace resnet_fused::driver
