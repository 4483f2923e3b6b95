#include "../launch/stem.h"

#include "../device/stem_tile.h"
#include "conv.h"
#include "float8.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfStem> kOp = {"stem", rf_stem_configurations, rf_stem_configuration,
                                   rf_stem_plan, rf_stem_cuda};
constexpr int64_t kWindow = 3;
constexpr int64_t kStep = 2;
constexpr int64_t kBorder = 1;
constexpr double kQuantisedFactor = 0.25;  // some results of integers saturate, others are rounded

int64_t pooled(int64_t size) { return size == 0 ? 0 : (size + 2 * kBorder - kWindow) / kStep + 1; }

// A window's largest value, and how far it may be off: no further than one of its elements.
struct Largest {
  double value = -std::numeric_limits<double>::infinity();
  double bound = 0;

  void add(double element, double allowed) {
    value = std::max(value, element);
    bound = std::max(bound, allowed);
  }
};

template <class T, class Out>
bool run(const Convolution& of, const Arguments& arguments, Common& common, Json& json) {
  const Size conv = of.out_size();
  const Size size{conv[0], conv[1], pooled(conv[2]), pooled(conv[3])};
  const Layout conv_at(conv, of.channels_last), out_at(size, of.channels_last);
  constexpr bool quantised = std::is_same_v<Out, Float8>;
  constexpr double factor = quantised ? kQuantisedFactor : 1;
  const Operand<T> x(elements_of(of.x_size()), common.random, common.values);
  const Operand<T> weight(elements_of(of.weight_size()), common.random, common.values);
  const Operand<float> scale(of.k, common.random, common.values);
  const Operand<float> shift(of.k, common.random, common.values);
  Operand<Out> out(elements_of(size));

  RfStem problem{};
  problem.dtype = static_cast<int32_t>(common.dtype);
  problem.out_dtype = quantised ? kFloat8E4M3 : problem.dtype;
  problem.out_factor = static_cast<float>(factor);
  problem.image = static_cast<int32_t>(StemImage::kWeights);
  problem.x = x.device.data();
  problem.weight = weight.device.data();
  problem.scale = scale.device.data();
  problem.shift = shift.device.data();
  problem.out = out.device.data();
  problem.flow = common.flow;
  weight.device.mark_constant("weight");
  scale.device.mark_constant("scale");
  shift.device.mark_constant("shift");
  copy_to(problem.x_size, of.x_size());
  copy_to(problem.weight_size, of.weight_size());
  copy_to(problem.x_stride, of.x_at().stride);
  copy_to(problem.weight_stride, of.weight_at().stride);
  copy_to(problem.out_stride, out_at.stride);
  std::fill_n(problem.stride, 2, of.stride);
  std::fill_n(problem.padding, 2, of.padding);
  std::fill_n(problem.pool_kernel, 2, kWindow);
  std::fill_n(problem.pool_stride, 2, kStep);
  std::fill_n(problem.pool_padding, 2, kBorder);
  const Planned<RfStem> planned(kOp, problem, arguments, json);
  common.run([&] { planned.launch(); });
  out.fetch();

  const std::vector<Sum> sums = convolve(of, x, weight);
  const double error = sum_error<T>(common, of.c * of.r * of.s);
  Verdict verdict;
  const auto judge = [&](int64_t n, int64_t k, int64_t p, int64_t q) {
    Largest largest;
    for (int64_t i = 0; i < kWindow * kWindow; ++i) {
      const int64_t row = p * kStep - kBorder + i / kWindow;
      const int64_t column = q * kStep - kBorder + i % kWindow;
      if (row < 0 || row >= conv[2] || column < 0 || column >= conv[3]) continue;
      const Sum& sum = sums[static_cast<size_t>(conv_at.at(n, k, row, column))];
      const double value = std::max(scale.at(k) * sum.value + shift.at(k), 0.0);
      const double magnitude = std::fabs(scale.at(k)) * sum.magnitude + std::fabs(shift.at(k));
      largest.add(value * factor, error * magnitude * factor);
    }
    verdict.rounded<Out>(out.at(out_at.at(n, k, p, q)), largest.value, largest.bound,
                         common.values);
  };
  for (int64_t i = 0; i < elements_of(size); ++i) {
    judge(i / (size[1] * size[2] * size[3]), i / (size[2] * size[3]) % size[1],
          i / size[3] % size[2], i % size[3]);
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

}  // namespace

bool run_stem(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  return with_conv_type(kOp.name, common.dtype, [&]<class T>() {
    return arguments.flag("quantised") ? run<T, Float8>(of, arguments, common, json)
                                       : run<T, T>(of, arguments, common, json);
  });
}

}  // namespace resnet_fused::driver
