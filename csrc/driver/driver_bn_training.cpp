#include "bn_pass.h"

namespace resnet_fused::driver {
namespace {

constexpr PassInterface kForward = {"bn_add_act", BnTrainingOp::kForward, rf_bn_add_act_cuda};
constexpr PassInterface kBackward = {"bn_add_act_backward", BnTrainingOp::kBackward,
                                     rf_bn_add_act_backward_cuda};
constexpr PassInterface kApply = {"bn_backward_apply", BnTrainingOp::kApply,
                                  rf_bn_backward_apply_cuda};

// out = act(scale y + shift + shortcut), the shortcut being as it is, or behind a BatchNorm of its
// own, or in --part channels from the middle on.
template <class T>
class AddAct {
 public:
  AddAct(const Arguments& arguments, Common& common)
      : arguments_(arguments),
        common_(common),
        of_(arguments),
        residual_of_(of_),
        has_residual_(arguments.flag("residual")),
        normed_(arguments.flag("normed")) {
    const int64_t part = arguments.integer("part", 0);
    if (!has_residual_ && (normed_ || part != 0)) {
      throw UsageError("--normed and --part are the shortcut's; give --residual");
    }
    if (part > of_.channels() || (normed_ && part != 0)) {
      throw UsageError("--part: from 1 to --c channels, without --normed");
    }
    if (part != 0) residual_of_.size[1] = part;
    residual_ =
        Operand<T>(has_residual_ ? residual_of_.elements() : 0, common.random, common.values);
  }

  BnTrainingCall call() const {
    BnTrainingCall call = pass_call(kForward, of_, common_, arguments_);
    place(call, kRaw, y_, of_.at());
    place(call, kResidual, residual_, residual_of_.at());
    place(call, kResult, out_, of_.at());
    call.norm = norm_.device.data();
    call.residual_norm = normed_ ? residual_norm_.device.data() : nullptr;
    call.residual_first = first();
    call.residual_channels = has_residual_ ? residual_of_.channels() : 0;
    return call;
  }

  void fetch() { out_.fetch(); }

  void judge(Verdict& verdict) const {
    const bool relu = call().relu;
    const Layout at = of_.at(), residual_at = residual_of_.at();
    const auto& [n, channels, h, w] = of_.size;
    for (int64_t i = 0; i < of_.elements(); ++i) {
      const int64_t image = i / (channels * h * w), c = i / (h * w) % channels;
      const int64_t row = i / w % h, column = i % w;
      const int64_t here = at.at(image, c, row, column);
      Sum sum;
      norm_.add_to(sum, c, y_.at(here));
      if (has_residual_ && c >= first() && c - first() < residual_of_.channels()) {
        const double r = residual_.at(residual_at.at(image, c - first(), row, column));
        normed_ ? residual_norm_.add_to(sum, c, r) : sum.add(r);
      }
      const double expected = relu && sum.value < 0 ? 0 : sum.value;
      verdict.rounded<T>(out_.at(here), expected, kAffineError * sum.magnitude, common_.values);
    }
  }

 private:
  int64_t first() const { return (of_.channels() - residual_of_.channels()) / 2; }

  const Arguments& arguments_;
  Common& common_;
  Images of_, residual_of_;
  bool has_residual_, normed_;
  Operand<T> y_{of_.elements(), common_.random, common_.values};
  Norm norm_{of_.channels(), common_};
  Norm residual_norm_{normed_ ? of_.channels() : 0, common_};
  Operand<T> residual_{0};
  Operand<T> out_{of_.elements()};
};

// dz = dout where the result passed the ReLU, and its sums. The result is made again of y, or, with
// a shortcut, read.
template <class T>
class AddActBackward {
 public:
  AddActBackward(const Arguments& arguments, Common& common)
      : arguments_(arguments),
        common_(common),
        of_(arguments),
        from_out_(arguments.flag("residual")),
        projected_(arguments.flag("normed")) {
    if (projected_ && !from_out_) throw UsageError("--normed is the shortcut's; give --residual");
  }

  BnTrainingCall call() const {
    BnTrainingCall call = pass_call(kBackward, of_, common_, arguments_);
    place(call, kRaw, y_, of_.at());
    place(call, kGradient, dout_, of_.at());
    place(call, kPassed, out_, of_.at());
    place(call, kResidual, residual_, of_.at());
    place(call, kResult, dz_, of_.at());
    call.norm = norm_.device.data();
    call.residual_norm = projected_ ? residual_norm_.device.data() : nullptr;
    call.sums = sums_.device.data();
    call.rows = projected_ ? 3 : 2;
    return call;
  }

  void fetch() {
    dz_.fetch();
    sums_.fetch();
  }

  void judge(Verdict& verdict) const {
    const bool relu = call().relu;
    for (int64_t i = 0; i < of_.elements(); ++i) {
      const double result = from_out_ ? out_.at(i) : normalised<T>(norm_, of_.channel(i), y_.at(i));
      verdict.equal(dz_.at(i), relu && result <= 0 ? 0 : dout_.at(i));
    }
    std::vector<Branch<T>> branches{{y_, norm_}};
    if (projected_) branches.push_back({residual_, residual_norm_});
    judge_sums(of_, dz_, branches, sums_, common_.values, verdict);
  }

 private:
  const Arguments& arguments_;
  Common& common_;
  Images of_;
  bool from_out_, projected_;
  Operand<T> y_{of_.elements(), common_.random, common_.values};
  Operand<T> dout_{of_.elements(), common_.random, common_.values};
  Operand<T> out_{from_out_ ? of_.elements() : 0, common_.random, common_.values};
  Operand<T> residual_{projected_ ? of_.elements() : 0, common_.random, common_.values};
  Norm norm_{of_.channels(), common_};
  Norm residual_norm_{projected_ ? of_.channels() : 0, common_};
  Operand<T> dz_{of_.elements()};
  Operand<float> sums_{(projected_ ? 3 : 2) * of_.channels()};
};

// dy = A dz + B y + C.
template <class T>
class BackwardApply {
 public:
  BackwardApply(const Arguments& arguments, Common& common)
      : arguments_(arguments), common_(common), of_(arguments) {
    refuse_residual(kApply.name, arguments);
  }

  BnTrainingCall call() const {
    BnTrainingCall call = pass_call(kApply, of_, common_, arguments_);
    place(call, kRaw, y_, of_.at());
    place(call, kGradient, dz_, of_.at());
    place(call, kResult, dy_, of_.at());
    call.norm = coefficients_.device.data();
    return call;
  }

  void fetch() { dy_.fetch(); }

  void judge(Verdict& verdict) const {
    const int64_t channels = of_.channels();
    for (int64_t i = 0; i < of_.elements(); ++i) {
      const int64_t c = of_.channel(i);
      Sum sum;
      sum.add(coefficients_.at(c) * dz_.at(i));
      sum.add(coefficients_.at(channels + c) * y_.at(i));
      sum.add(coefficients_.at(2 * channels + c));
      verdict.rounded<T>(dy_.at(i), sum.value, kAffineError * sum.magnitude, common_.values);
    }
  }

 private:
  const Arguments& arguments_;
  Common& common_;
  Images of_;
  Operand<T> y_{of_.elements(), common_.random, common_.values};
  Operand<T> dz_{of_.elements(), common_.random, common_.values};
  Operand<float> coefficients_{3 * of_.channels(), common_.random, common_.values};
  Operand<T> dy_{of_.elements()};
};

}  // namespace

bool run_bn_add_act(const Arguments& arguments, Common& common, Json& json) {
  return run_pass<AddAct>(kForward, arguments, common, json);
}

bool run_bn_add_act_backward(const Arguments& arguments, Common& common, Json& json) {
  return run_pass<AddActBackward>(kBackward, arguments, common, json);
}

bool run_bn_backward_apply(const Arguments& arguments, Common& common, Json& json) {
  return run_pass<BackwardApply>(kApply, arguments, common, json);
}

}  // namespace resnet_fused::driver
