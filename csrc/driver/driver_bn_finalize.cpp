#include <type_traits>

#include "../launch/bn_finalize_cuda.h"
#include "op.h"

namespace resnet_fused::driver {
namespace {

constexpr double kEps = 1e-5;
constexpr double kFactor = 0.1;      // of a batch in the running statistics
constexpr int64_t kBatches = 3;      // that were counted before
constexpr double kInside = 0x1p-49;  // what eight roundings in double may come to

// What the arithmetic on `c` channels is told, and how its results are judged: computed in double,
// rounded once to V.
template <class V>
struct Channels {
  int64_t count;
  double elements;
  bool on_device;
  Operand<double> total{1};

  Channels(const Arguments& arguments, Common&)
      : count(arguments.integer("c", 1)),
        elements(static_cast<double>(arguments.integer("n", 1) * arguments.integer("h", 1) *
                                     arguments.integer("w", 1))),
        on_device(arguments.flag("total")) {
    total.host[0] = elements;
    total.device.copy_from(total.host.data());
  }

  // Where the number lies on the device, that of the call is another one.
  ChannelCount number() const {
    return on_device ? ChannelCount{static_cast<const double*>(total.device.data()), 1}
                     : ChannelCount{nullptr, elements};
  }
  static ChannelVector vector(const Operand<V>& values) {
    return {values.device.data(), std::is_same_v<V, double>};
  }
  // `magnitude`: of the terms that cancel.
  static void settle(Verdict& verdict, double found, double expected, double magnitude) {
    verdict.within(
        found, expected,
        kUnitRoundoff<V> * std::fabs(expected) + kInside * magnitude + kHalfSubnormal<V>);
  }
};

// Values of which squares are taken: sums of squares, as M2 is.
template <class V>
void square(Operand<V>& values, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    V& value = values.host[static_cast<size_t>(i)];
    value *= value;
  }
  values.device.copy_from(values.host.data());
}

// [2, C] mean and M2 -> [4, C] scale, shift, mean, invstd.
template <class V>
class Finalize {
 public:
  static constexpr const char* kName = "bn_finalize";

  Finalize(const Arguments& arguments, Common& common) : of_(arguments, common), common_(common) {
    square(stats_, of_.count, 2 * of_.count);
  }

  int launch() const {
    const ChannelVector stats = of_.vector(stats_), gamma = of_.vector(gamma_);
    const ChannelVector beta = of_.vector(beta_), norm = of_.vector(norm_);
    const ChannelCount number = of_.number();
    return rf_bn_finalize_cuda(&stats, &gamma, &beta, of_.count, &number, kEps, &norm, nullptr);
  }

  void judge(Verdict& verdict) {
    norm_.fetch();
    const int64_t channels = of_.count;
    for (int64_t k = 0; k < channels; ++k) {
      const double mean = stats_.at(k), variance = stats_.at(channels + k) / of_.elements;
      const double invstd = 1 / std::sqrt(variance + kEps), scale = gamma_.at(k) * invstd;
      // Of the scale as it was stored, whose error then cancels.
      const double product = mean * norm_.at(k);
      of_.settle(verdict, norm_.at(k), scale, std::fabs(scale));
      of_.settle(verdict, norm_.at(channels + k), beta_.at(k) - product,
                 std::fabs(beta_.at(k)) + std::fabs(product));
      verdict.equal(norm_.at(2 * channels + k), mean);
      of_.settle(verdict, norm_.at(3 * channels + k), invstd, invstd);
    }
  }

 private:
  Channels<V> of_;
  Common& common_;
  Operand<V> stats_{2 * of_.count, common_.random, common_.values};
  Operand<V> gamma_{of_.count, common_.random, common_.values};
  Operand<V> beta_{of_.count, common_.random, common_.values};
  Operand<V> norm_{4 * of_.count};
};

// A batch's statistics into the running ones, in place.
template <class V>
class UpdateStats {
 public:
  static constexpr const char* kName = "bn_update_stats";

  UpdateStats(const Arguments& arguments, Common& common)
      : of_(arguments, common),
        common_(common),
        tracked_(arguments.choice("tracked", {"none", "int32", "int64"})),
        cumulative_(arguments.flag("cumulative")) {
    if (cumulative_ && tracked_ == kNone) throw UsageError("--cumulative: give --tracked, too");
    if (of_.elements < 2) throw UsageError("one value a channel has no variance");
    square(stats_, of_.count, 2 * of_.count);
    before_mean_ = mean_.host;
    before_variance_ = variance_.host;
    // The lower half of an int64 is the int32.
    counter_.copy_from(&kBatches);
  }

  int launch() const {
    const ChannelVector stats = of_.vector(stats_);
    const ChannelVector mean = of_.vector(mean_), variance = of_.vector(variance_);
    const ChannelCount number = of_.number();
    return rf_bn_update_stats_cuda(&stats, of_.count, &number, cumulative_ ? nullptr : &kFactor,
                                   &mean, &variance, tracked_ != kNone ? counter_.data() : nullptr,
                                   tracked_ == kLong, nullptr);
  }

  void judge(Verdict& verdict) {
    mean_.fetch();
    variance_.fetch();
    const int64_t channels = of_.count;
    const double factor = cumulative_ ? 1.0 / static_cast<double>(kBatches + 1) : kFactor;
    const auto average = [&](double found, double before, double now) {
      const double kept = (1 - factor) * before, added = factor * now;
      of_.settle(verdict, found, kept + added, std::fabs(kept) + std::fabs(added));
    };
    for (int64_t k = 0; k < channels; ++k) {
      const auto place = static_cast<size_t>(k);
      average(mean_.at(k), to_double(before_mean_[place]), stats_.at(k));
      average(variance_.at(k), to_double(before_variance_[place]),
              stats_.at(channels + k) / (of_.elements - 1));
    }
    int64_t counted = 0;
    counter_.copy_to(&counted);
    const int64_t more = tracked_ != kNone;
    verdict.equal(static_cast<double>(counted), static_cast<double>(kBatches + more));
  }

 private:
  enum Tracked { kNone, kInt, kLong };

  Channels<V> of_;
  Common& common_;
  int tracked_;
  bool cumulative_;
  Operand<V> stats_{2 * of_.count, common_.random, common_.values};
  Operand<V> mean_{of_.count, common_.random, common_.values};
  Operand<V> variance_{of_.count, common_.random, common_.values};
  std::vector<V> before_mean_, before_variance_;
  Buffer counter_{sizeof(int64_t)};
};

// The sums of backward -> [3, C] A, B, C, and the gradients of gamma and beta.
template <class V>
class BackwardFinalize {
 public:
  static constexpr const char* kName = "bn_backward_finalize";

  BackwardFinalize(const Arguments& arguments, Common& common)
      : of_(arguments, common),
        common_(common),
        row_(arguments.flag("residual") ? 2 : 1),
        frozen_(arguments.flag("frozen")) {}

  int launch() const {
    const ChannelVector sums = of_.vector(sums_), all = of_.vector(all_sums_);
    const ChannelVector norm = of_.vector(norm_);
    const ChannelVector results[3] = {of_.vector(coefficients_), of_.vector(dgamma_),
                                      of_.vector(dbeta_)};
    const ChannelCount number = of_.number();
    return rf_bn_backward_finalize_cuda(&sums, &all, &norm, of_.count, &number, row_, frozen_,
                                        &results, nullptr);
  }

  void judge(Verdict& verdict) {
    for (Operand<V>* result : {&coefficients_, &dgamma_, &dbeta_}) result->fetch();
    const int64_t channels = of_.count;
    for (int64_t k = 0; k < channels; ++k) {
      const double scale = norm_.at(k), mean = norm_.at(2 * channels + k);
      const double invstd = norm_.at(3 * channels + k);
      const double share = frozen_ ? 0 : scale / of_.elements;
      const double b = -share * invstd * invstd * all_sums_.at(row_ * channels + k);
      // Of B as it was stored, whose error then cancels.
      const double plain = -share * all_sums_.at(k);
      const double product = coefficients_.at(channels + k) * mean;
      const double dgamma = invstd * sums_.at(row_ * channels + k);
      verdict.equal(coefficients_.at(k), scale);
      of_.settle(verdict, coefficients_.at(channels + k), b, std::fabs(b));
      of_.settle(verdict, coefficients_.at(2 * channels + k), plain - product,
                 std::fabs(plain) + std::fabs(product));
      of_.settle(verdict, dgamma_.at(k), dgamma, std::fabs(dgamma));
      verdict.equal(dbeta_.at(k), sums_.at(k));
    }
  }

 private:
  Channels<V> of_;
  Common& common_;
  int64_t row_;
  bool frozen_;
  Operand<V> sums_{(row_ + 1) * of_.count, common_.random, common_.values};
  Operand<V> all_sums_{(row_ + 1) * of_.count, common_.random, common_.values};
  Operand<V> norm_{4 * of_.count, common_.random, common_.values};
  Operand<V> coefficients_{3 * of_.count};
  Operand<V> dgamma_{of_.count};
  Operand<V> dbeta_{of_.count};
};

template <template <class> class Op>
bool run(const Arguments& arguments, Common& common, Json& json) {
  return with_type(common.dtype, [&]<class V>(V) -> bool {
    if constexpr (std::is_floating_point_v<V>) {
      Op<V> op(arguments, common);
      const auto launch = [&] { check(op.launch(), Op<V>::kName); };
      launch();
      Verdict verdict;
      op.judge(verdict);
      const bool right = report(verdict, json);
      report_times(time_calls(common.repeats, launch), json);
      return right;
    } else {
      throw UsageError(std::string("--dtype: ") + Op<V>::kName + " serves float32 and float64");
    }
  });
}

}  // namespace

bool run_bn_finalize(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual("bn_finalize", arguments);
  return run<Finalize>(arguments, common, json);
}

bool run_bn_update_stats(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual("bn_update_stats", arguments);
  return run<UpdateStats>(arguments, common, json);
}

bool run_bn_backward_finalize(const Arguments& arguments, Common& common, Json& json) {
  return run<BackwardFinalize>(arguments, common, json);
}

}  // namespace resnet_fused::driver
