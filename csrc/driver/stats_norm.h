// What conv_bn_stats makes of its statistics with --finalize: scale and shift, and the running
// statistics in place; and how they are judged, by the mean and M2 that the launch has left.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../launch/conv_bn_stats.h"
#include "conv.h"

namespace resnet_fused::driver {

class StatsNormResults {
 public:
  StatsNormResults(int64_t channels, double elements, const Arguments& arguments, Common& common)
      : channels_(channels),
        elements_(elements),
        tracked_(arguments.choice("tracked", {"none", "int32", "int64"})),
        cumulative_(arguments.flag("cumulative")),
        wanted_(arguments.flag("finalize")),
        common_(common) {
    if (!wanted_ && (cumulative_ || tracked_ != kNone)) {
      throw UsageError("--tracked and --cumulative are for --finalize");
    }
    if (cumulative_ && tracked_ == kNone) throw UsageError("--cumulative: give --tracked, too");
    if (wanted_ && elements < 2) throw UsageError("one value a channel has no variance");
    before_mean_ = mean_.host;
    before_variance_ = variance_.host;
    // The lower half of an int64 is the int32.
    counter_.copy_from(&kBatches);
  }

  RfStatsNorm arguments() const {
    if (!wanted_) return {};
    const auto vector = [](const Operand<float>& of) {
      return ChannelVector{of.device.data(), false};
    };
    return {norm_.device.data(),
            vector(gamma_),
            vector(beta_),
            kEps,
            vector(mean_),
            vector(variance_),
            kept_.device.data(),
            tracked_ != kNone ? counter_.data() : nullptr,
            tracked_ == kLong,
            cumulative_,
            kFactor};
  }

  // stats: [2, K], as the launch has left them.
  void judge(const Operand<float>& stats, Verdict& verdict) {
    if (!wanted_) return;
    for (Operand<float>* one : {&norm_, &mean_, &variance_}) one->fetch();
    kept_.fetch();
    const double factor = cumulative_ ? 1.0 / static_cast<double>(kBatches + 1) : kFactor;
    for (int64_t k = 0; k < channels_; ++k) {
      const double mean = stats.at(k), m2 = stats.at(channels_ + k);
      const double invstd = 1 / std::sqrt(m2 / elements_ + kEps), scale = gamma_.at(k) * invstd;
      // Of the scale as it was stored, whose error then cancels.
      const double product = mean * norm_.at(k);
      settle(verdict, norm_.at(k), scale, std::fabs(scale));
      settle(verdict, norm_.at(channels_ + k), beta_.at(k) - product,
             std::fabs(beta_.at(k)) + std::fabs(product));
      verdict.equal(norm_.at(2 * channels_ + k), mean);
      settle(verdict, norm_.at(3 * channels_ + k), invstd, invstd);
      const auto place = static_cast<size_t>(k);
      const auto average = [&](double found, double before, double now) {
        const double old = (1 - factor) * before, added = factor * now;
        settle(verdict, found, old + added, std::fabs(old) + std::fabs(added));
      };
      average(mean_.at(k), before_mean_[place], mean);
      average(variance_.at(k), before_variance_[place], m2 / (elements_ - 1));
      verdict.equal(kept_.at(k), before_mean_[place]);
      verdict.equal(kept_.at(channels_ + k), before_variance_[place]);
    }
    int64_t counted = 0;
    counter_.copy_to(&counted);
    verdict.equal(static_cast<double>(counted),
                  static_cast<double>(kBatches + (tracked_ != kNone)));
  }

 private:
  enum Tracked { kNone, kInt, kLong };
  static constexpr double kEps = 1e-5;
  static constexpr double kFactor = 0.1;      // of a batch in the running statistics
  static constexpr int64_t kBatches = 3;      // that were counted before
  static constexpr double kInside = 0x1p-49;  // what eight roundings in double may come to

  // Computed in double, rounded once. `magnitude`: of the terms that cancel.
  static void settle(Verdict& verdict, double found, double expected, double magnitude) {
    verdict.within(
        found, expected,
        kUnitRoundoff<float> * std::fabs(expected) + kInside * magnitude + kHalfSubnormal<float>);
  }
  int64_t drawn() const { return wanted_ ? channels_ : 0; }

  int64_t channels_;
  double elements_;
  int tracked_;
  bool cumulative_, wanted_;
  Common& common_;
  Operand<float> gamma_{drawn(), common_.random, common_.values};
  Operand<float> beta_{drawn(), common_.random, common_.values};
  Operand<float> mean_{drawn(), common_.random, common_.values};
  Operand<float> variance_{drawn(), common_.random, common_.values};
  Operand<float> norm_{4 * drawn()};
  Operand<double> kept_{2 * drawn()};
  std::vector<float> before_mean_, before_variance_;
  Buffer counter_{sizeof(int64_t)};
};

}  // namespace resnet_fused::driver
