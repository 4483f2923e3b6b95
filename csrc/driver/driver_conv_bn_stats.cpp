#include "../launch/conv_bn_stats.h"

#include "../launch/bn_add_act_conv_stats.h"
#include "bn_operands.h"
#include "stats_norm.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnStats> kStats = {"conv_bn_stats", rf_conv_bn_stats_configurations,
                                             rf_conv_bn_stats_configuration, rf_conv_bn_stats_plan,
                                             rf_conv_bn_stats_cuda};
constexpr Interface<RfBnAddActConvStats> kBlockEnd = {
    "bn_add_act_conv_stats", rf_bn_add_act_conv_stats_configurations,
    rf_bn_add_act_conv_stats_configuration, rf_bn_add_act_conv_stats_plan,
    rf_bn_add_act_conv_stats_cuda};

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

// The weights, the raw output z = conv(h, weight), and its statistics.
template <class T>
class Product {
 public:
  Product(const Convolution& of, Common& common)
      : of_(of),
        common_(common),
        weight_(elements_of(of.weight_size()), common.random, common.values),
        z_(elements_of(of.out_size())),
        stats_(kStatsRows * of.k) {}

  // Of x, which is read through `norm` if that has channels.
  RfConvBnStats problem(const Operand<T>& x, const Norm& norm) const {
    RfConvBnStats problem{};
    problem.conv = problem_of<RfConvBnAct>(of_, common_);
    problem.conv.x = x.device.data();
    problem.conv.weight = weight_.device.data();
    problem.conv.out = z_.device.data();
    copy_to(problem.conv.out_stride, of_.out_at().stride);
    problem.norm = norm.device.data();
    problem.normed = norm.channels != 0;
    problem.stats = stats_.device.data();
    return problem;
  }

  const Operand<float>& stats() const { return stats_; }

  // H: of values by their places in x.
  template <class H>
  void judge(const H& h, Verdict& verdict) {
    z_.fetch();
    stats_.fetch();
    const std::vector<Sum> sums = convolve(of_, h, weight_);
    const double error = sum_error<T>(common_, of_.c / of_.groups * of_.r * of_.s);
    for (int64_t place = 0; place < static_cast<int64_t>(sums.size()); ++place) {
      const Sum& sum = sums[static_cast<size_t>(place)];
      verdict.rounded<T>(z_.at(place), sum.value, error * sum.magnitude, common_.values);
    }
    judge_stats(of_, z_, stats_, verdict);
  }

 private:
  static constexpr int64_t kStatsRows = 2;

  const Convolution& of_;
  const Common& common_;
  Operand<T> weight_, z_;
  Operand<float> stats_;
};

template <class T>
class ConvBnStats {
 public:
  ConvBnStats(const Convolution& of, const Arguments& arguments, Common& common)
      : of_(of),
        x_(elements_of(of.x_size()), common.random, common.values),
        product_(of, common),
        norm_(arguments.flag("normed") ? of.c : 0, common),
        finalized_(of.k, static_cast<double>(of.n * of.p() * of.q()), arguments, common) {}

  RfConvBnStats problem() const {
    RfConvBnStats problem = product_.problem(x_, norm_);
    problem.finalized = finalized_.arguments();
    return problem;
  }

  void judge(Verdict& verdict) {
    const Norm* norm = norm_.channels != 0 ? &norm_ : nullptr;
    product_.judge(NormedRead<T>(x_, norm, of_.x_at().stride[1]), verdict);
    finalized_.judge(product_.stats(), verdict);
  }

 private:
  const Convolution& of_;
  Operand<T> x_;
  Product<T> product_;
  Norm norm_;
  StatsNormResults finalized_;
};

// The convolution is judged by out as it was stored.
template <class T>
class BlockEnd {
 public:
  BlockEnd(const Convolution& of, const Arguments& arguments, Common& common)
      : common_(common),
        images_(arguments),
        y_(images_.elements(), common.random, common.values),
        shortcut_(images_.elements(), common.random, common.values),
        product_(of, common),
        norm_(of.c, common),
        shortcut_norm_(arguments.flag("normed") ? of.c : 0, common),
        out_(images_.elements()) {}

  RfBnAddActConvStats problem() const {
    RfBnAddActConvStats problem{};
    problem.stats = product_.problem(y_, norm_);
    problem.residual = shortcut_.device.data();
    problem.residual_norm = shortcut_norm_.device.data();
    problem.out = out_.device.data();
    problem.projected = projected();
    copy_to(problem.residual_stride, images_.at().stride);
    copy_to(problem.out_stride, images_.at().stride);
    return problem;
  }

  void judge(Verdict& verdict) {
    out_.fetch();
    for (int64_t i = 0; i < images_.elements(); ++i) {
      const int64_t c = images_.channel(i);
      Sum sum;
      norm_.add_to(sum, c, y_.at(i));
      projected() ? shortcut_norm_.add_to(sum, c, shortcut_.at(i)) : sum.add(shortcut_.at(i));
      verdict.rounded<T>(out_.at(i), sum.value < 0 ? 0 : sum.value, kAffineError * sum.magnitude,
                         common_.values);
    }
    product_.judge(out_, verdict);
  }

 private:
  bool projected() const { return shortcut_norm_.channels != 0; }

  const Common& common_;
  Images images_;
  Operand<T> y_, shortcut_;
  Product<T> product_;
  Norm norm_, shortcut_norm_;
  Operand<T> out_;
};

template <template <class> class Op, class Problem>
bool run(const Interface<Problem>& interface, const Arguments& arguments, Common& common,
         Json& json) {
  const Convolution of(arguments);
  return with_conv_type(interface.name, common.dtype, [&]<class T>() {
    Op<T> op(of, arguments, common);
    const Planned<Problem> planned(interface, op.problem(), arguments, json);
    planned.launch();
    Verdict verdict;
    if (planned.launches()) op.judge(verdict);  // else nothing is written
    const bool right = report(verdict, json);
    report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
    return right;
  });
}

}  // namespace

bool run_conv_bn_stats(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kStats.name, arguments);
  return run<ConvBnStats>(kStats, arguments, common, json);
}

bool run_bn_add_act_conv_stats(const Arguments& arguments, Common& common, Json& json) {
  return run<BlockEnd>(kBlockEnd, arguments, common, json);
}

}  // namespace resnet_fused::driver
