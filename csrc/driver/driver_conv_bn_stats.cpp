#include "../launch/conv_bn_stats.h"

#include "bn_operands.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnStats> kOp = {"conv_bn_stats", rf_conv_bn_stats_configurations,
                                          rf_conv_bn_stats_configuration, rf_conv_bn_stats_plan,
                                          rf_conv_bn_stats_cuda};

// Mean and M2 of each channel of y as it was stored, as resnet_fused/numerics/training.py bounds
// them for a single tile: also on integers, whose mean is no integer.
template <class T>
void judge_stats(const Convolution& of, const Operand<T>& y, const Operand<float>& stats,
                 Verdict& verdict) {
  constexpr double u = kUnitRoundoff<float>, kMean = 8, kSpread = 12, kVariance = 32;
  const Layout y_at = of.out_at();
  const int64_t image = of.p() * of.q();
  const auto count = static_cast<double>(of.n * image);
  const auto over_pixels = [&](int64_t k, const auto& body) {
    for (int64_t i = 0; i < of.n * image; ++i) {
      body(y.at(y_at.at(i / image, k, i % image / of.q(), i % of.q())));
    }
  };
  for (int64_t k = 0; k < of.k; ++k) {
    double sum = 0, m2 = 0;
    over_pixels(k, [&](double value) { sum += value; });
    const double mean = sum / count;
    over_pixels(k, [&](double value) { m2 += (value - mean) * (value - mean); });
    const double deviation = std::sqrt(m2 / count);
    const double off = kMean * u * (std::fabs(mean) + deviation);
    const double spread = kSpread * std::fabs(mean) * deviation * count;
    verdict.within(stats.at(k), mean, off + kHalfSubnormal<float>);
    verdict.within(stats.at(of.k + k), m2,
                   u * (kVariance * m2 + spread) + count * off * off + kHalfSubnormal<float>);
  }
}

template <class T>
bool run(const Convolution& of, const Arguments& arguments, Common& common, Json& json) {
  constexpr int64_t kStatsRows = 2;
  const bool normed = arguments.flag("normed");
  const Operand<T> x(elements_of(of.x_size()), common.random, common.values);
  const Operand<T> weight(elements_of(of.weight_size()), common.random, common.values);
  const Norm norm(normed ? of.c : 0, common);
  Operand<T> y(elements_of(of.out_size()));
  Operand<float> stats(kStatsRows * of.k);

  RfConvBnStats problem{};
  problem.conv = problem_of<RfConvBnAct>(of, common);
  problem.conv.x = x.device.data();
  problem.conv.weight = weight.device.data();
  problem.conv.out = y.device.data();
  copy_to(problem.conv.out_stride, of.out_at().stride);
  problem.norm = norm.device.data();
  problem.normed = normed;
  problem.stats = stats.device.data();
  const Planned<RfConvBnStats> planned(kOp, problem, arguments, json);
  planned.launch();

  Verdict verdict;
  if (planned.launches()) {  // else nothing is written
    y.fetch();
    stats.fetch();
    const NormedRead<T> read(x, normed ? &norm : nullptr, of.x_at().stride[1]);
    const std::vector<Sum> sums = convolve(of, read, weight);
    const double error = sum_error<T>(common, of.c / of.groups * of.r * of.s);
    for (int64_t place = 0; place < static_cast<int64_t>(sums.size()); ++place) {
      const Sum& sum = sums[static_cast<size_t>(place)];
      verdict.rounded<T>(y.at(place), sum.value, error * sum.magnitude, common.values);
    }
    judge_stats(of, y, stats, verdict);
  }
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

}  // namespace

bool run_conv_bn_stats(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kOp.name, arguments);
  const Convolution of(arguments);
  return with_conv_type(kOp.name, common.dtype,
                        [&]<class T>() { return run<T>(of, arguments, common, json); });
}

}  // namespace resnet_fused::driver
