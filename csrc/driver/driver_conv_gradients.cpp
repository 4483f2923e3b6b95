#include "../launch/conv_gradients.h"
#include "conv.h"

namespace resnet_fused::driver {
namespace {

struct Gradient : Interface<RfConvGradient> {
  bool of_weight;  // else of the input
};
constexpr Gradient kDgrad = {{"conv_dgrad", rf_conv_dgrad_configurations,
                              rf_conv_dgrad_configuration, rf_conv_dgrad_plan, rf_conv_dgrad_cuda},
                             false};
constexpr Gradient kWgrad = {{"conv_wgrad", rf_conv_wgrad_configurations,
                              rf_conv_wgrad_configuration, rf_conv_wgrad_plan, rf_conv_wgrad_cuda},
                             true};

// One element of a gradient, the sum of g times the other operand, and what its error depends on.
struct Element {
  Sum sum;
  double squares = 0;  // of the products
  double others = 0;   // magnitudes of the other operand

  void add(double g, double other) {
    sum.add(g * other);
    squares += g * g * other * other;
    others += std::fabs(other);
  }
};

// How far an element may be from float64's, as resnet_fused/numerics/gradients.py has it. The
// gradient of the input takes scale * dz rounded to T: 3 u sqrt of the squares, and half of the
// smallest subnormal for each. All errors but the result's own rounding go through it.
template <class T>
double bound(const Gradient& op, const Element& element, double sum_error) {
  constexpr double u = kUnitRoundoff<T>;
  double error = sum_error * element.sum.magnitude;
  if (!op.of_weight) {
    error += 3 * u * std::sqrt(element.squares) + kHalfSubnormal<T> * element.others;
  }
  return error * (1 + u) + u * std::fabs(element.sum.value) + kHalfSubnormal<T>;
}

// scale * dz in `out_at`'s order: dz is dy where not (y <= 0), else 0.
template <class T>
std::vector<double> scaled_and_masked(const Convolution& of, const Operand<T>& dy,
                                      const Operand<T>* y, const Operand<float>& scale) {
  std::vector<double> g(dy.host.size());
  const int64_t step = of.out_at().stride[1];
  for (size_t i = 0; i < g.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    const bool passes = y == nullptr || !(y->at(place) <= 0);
    g[i] = passes ? scale.at(place / step % of.k) * dy.at(place) : 0;
  }
  return g;
}

template <class T>
bool run(const Gradient& op, const Convolution& of, const Arguments& arguments, Common& common,
         Json& json) {
  const bool relu = arguments.choice("act", {"none", "relu"}) == 1;
  const int64_t outputs = elements_of(of.out_size());
  const int64_t inputs = elements_of(of.x_size());
  const int64_t weights = elements_of(of.weight_size());
  const Operand<T> dy(outputs, common.random, common.values);
  const Operand<T> y(relu ? outputs : 0, common.random, common.values);
  const Operand<T> other(op.of_weight ? inputs : weights, common.random, common.values);
  const Operand<float> scale(of.k, common.random, common.values);
  Operand<T> result(op.of_weight ? weights : inputs);

  auto problem = problem_of<RfConvGradient>(of, common);
  problem.dy = dy.device.data();
  problem.y = relu ? y.device.data() : nullptr;
  problem.x = (op.of_weight ? other : result).device.data();
  problem.weight = (op.of_weight ? result : other).device.data();
  problem.scale = scale.device.data();
  copy_to(problem.dy_stride, of.out_at().stride);
  copy_to(problem.y_stride, of.out_at().stride);
  const Planned<RfConvGradient> planned(op, problem, arguments, json);
  planned.launch();
  // Where nothing is launched, the zeros are the caller's to write.
  if (planned.launches()) {
    result.fetch();
  } else {
    result.host.assign(result.host.size(), narrow<T>(0));
  }

  const std::vector<double> g = scaled_and_masked(of, dy, relu ? &y : nullptr, scale);
  std::vector<Element> elements(result.host.size());
  for_each_product(of, [&](int64_t x_place, int64_t weight_place, int64_t out_place) {
    const auto place = static_cast<size_t>(op.of_weight ? weight_place : x_place);
    elements[place].add(g[static_cast<size_t>(out_place)],
                        other.at(op.of_weight ? x_place : weight_place));
  });
  const int64_t depth = op.of_weight ? of.n * of.p() * of.q() : of.k / of.groups * of.r * of.s;
  const double error = sum_error<T>(common, depth);
  Verdict verdict;
  for (size_t i = 0; i < elements.size(); ++i) {
    const double found = result.at(static_cast<int64_t>(i));
    const double expected = elements[i].sum.value;
    if (common.values == Values::kIntegers) {
      verdict.equal(found, to_double(round_to<T>(expected)));
    } else {
      verdict.within(found, expected, bound<T>(op, elements[i], error));
    }
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

bool run_gradient(const Gradient& op, const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(op.name, arguments);
  const Convolution of(arguments);
  return with_conv_type(op.name, common.dtype,
                        [&]<class T>() { return run<T>(op, of, arguments, common, json); });
}

}  // namespace

bool run_conv_dgrad(const Arguments& arguments, Common& common, Json& json) {
  return run_gradient(kDgrad, arguments, common, json);
}

bool run_conv_wgrad(const Arguments& arguments, Common& common, Json& json) {
  return run_gradient(kWgrad, arguments, common, json);
}

}  // namespace resnet_fused::driver
