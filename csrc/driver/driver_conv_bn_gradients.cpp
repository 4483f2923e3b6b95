#include "../launch/conv_bn_dgrad.h"
#include "../launch/conv_bn_wgrad.h"
#include "bn_operands.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnDgrad> kDgrad = {"conv_bn_dgrad", rf_conv_bn_dgrad_configurations,
                                             rf_conv_bn_dgrad_configuration, rf_conv_bn_dgrad_plan,
                                             rf_conv_bn_dgrad_cuda};
constexpr Interface<RfConvBnWgrad> kWgrad = {"conv_bn_wgrad", rf_conv_bn_wgrad_configurations,
                                             rf_conv_bn_wgrad_configuration, rf_conv_bn_wgrad_plan,
                                             rf_conv_bn_wgrad_cuda};

// dy, the gradient of a convolution's output: dz, or with --affine A dz + (B y + C), rounded to T
// behind two fused multiply-adds in float32.
template <class T>
class OutputGradient {
 public:
  OutputGradient(const Convolution& of, const Arguments& arguments, Common& common)
      : of_(of),
        affine_(arguments.flag("affine")),
        dz_(outputs(), common.random, common.values),
        y_(affine_ ? outputs() : 0, common.random, common.values),
        coefficients_(affine_ ? kRows * of.k : 0, common.random, common.values) {}

  bool affine() const { return affine_; }
  const void* coefficients() const { return coefficients_.device.data(); }

  void place(RfConvGradient& product) const {
    product.dy = dz_.device.data();
    product.y = affine_ ? y_.device.data() : nullptr;
    copy_to(product.dy_stride, of_.out_at().stride);
    copy_to(product.y_stride, of_.out_at().stride);
  }

  // All of it, in `out_at`'s order.
  std::vector<double> values() const {
    std::vector<double> dy(dz_.host.size());
    const int64_t step = of_.out_at().stride[1];
    for (int64_t i = 0; i < outputs(); ++i) {
      dy[static_cast<size_t>(i)] = affine_ ? turned(i, i / step % of_.k) : dz_.at(i);
    }
    return dy;
  }

 private:
  static constexpr int64_t kRows = 3;

  int64_t outputs() const { return elements_of(of_.out_size()); }
  double turned(int64_t place, int64_t k) const {
    const auto row = [&](int64_t index) { return coefficients_.at(index * of_.k + k); };
    const double inner = round_to<float>(row(1) * y_.at(place) + row(2));
    return to_double(round_to<T>(row(0) * dz_.at(place) + inner));
  }

  const Convolution& of_;
  bool affine_;
  Operand<T> dz_, y_;
  Operand<float> coefficients_;
};

// x's gradient through the convolution, what comes through a shortcut added, masked and reduced.
template <class T>
class InputGradient {
 public:
  InputGradient(const Convolution& of, const Arguments& arguments, Common& common)
      : of_(of),
        common_(common),
        images_(arguments),
        step_(arguments.integer("addend", 0)),
        reduced_(arguments.flag("normed")),
        dy_(of, arguments, common),
        weight_(elements_of(of.weight_size()), common.random, common.values),
        addend_(elements_of(addend_size()), common.random, common.values),
        raw_(reduced_ ? images_.elements() : 0, common.random, common.values),
        norm_(reduced_ ? of.c : 0, common),
        x_(images_.elements()),
        sums_(reduced_ ? 2 * of.c : 0) {}

  RfConvBnDgrad problem() const {
    RfConvBnDgrad problem{};
    problem.conv = problem_of<RfConvGradient>(of_, common_);
    dy_.place(problem.conv);
    problem.conv.scale = dy_.coefficients();
    problem.conv.weight = weight_.device.data();
    problem.conv.x = x_.device.data();
    problem.addend = addend_.device.data();
    problem.raw = raw_.device.data();
    problem.norm = norm_.device.data();
    problem.sums = sums_.device.data();
    problem.affine = dy_.affine();
    problem.added = step_ != 0;
    problem.reduced = reduced_;
    problem.addend_step = step_;
    copy_to(problem.addend_stride, addend_at().stride);
    copy_to(problem.raw_stride, images_.at().stride);
    return problem;
  }

  // Where nothing is launched nothing is written, either.
  void judge(bool launched, Verdict& verdict) {
    if (!launched) return;
    x_.fetch();
    sums_.fetch();
    const std::vector<double> dy = dy_.values();
    std::vector<Sum> sums(x_.host.size());
    for_each_product(of_, [&](int64_t x, int64_t weight, int64_t out) {
      sums[static_cast<size_t>(x)].add(dy[static_cast<size_t>(out)] * weight_.at(weight));
    });
    add(sums);
    const double error = sum_error<T>(common_, of_.k / of_.groups * of_.r * of_.s);
    for (int64_t i = 0; i < images_.elements(); ++i) {
      const Sum& sum = sums[static_cast<size_t>(i)];
      if (reduced_ && normalised<T>(norm_, images_.channel(i), raw_.at(i)) <= 0) {
        verdict.equal(x_.at(i), 0);
      } else {
        verdict.rounded<T>(x_.at(i), sum.value, error * sum.magnitude, common_.values);
      }
    }
    if (reduced_) judge_sums<T>(images_, x_, {{raw_, norm_}}, sums_, common_.values, verdict);
  }

 private:
  Size addend_size() const {
    if (step_ == 0) return {};
    const auto every = [&](int64_t size) { return (size + step_ - 1) / step_; };
    return {of_.n, of_.c, every(of_.h), every(of_.w)};
  }
  Layout addend_at() const { return {addend_size(), of_.channels_last}; }

  void add(std::vector<Sum>& sums) const {
    const auto& [n, c, rows, columns] = addend_size();
    const Layout from = addend_at(), to = of_.x_at();
    const auto add_row = [&](int64_t image, int64_t channel, int64_t row) {
      for (int64_t q = 0; q < columns; ++q) {
        const auto place = to.at(image, channel, row * step_, q * step_);
        sums[static_cast<size_t>(place)].add(addend_.at(from.at(image, channel, row, q)));
      }
    };
    for (int64_t i = 0; i < n * c * rows; ++i) add_row(i / rows / c, i / rows % c, i % rows);
  }

  const Convolution& of_;
  const Common& common_;
  Images images_;
  int64_t step_;  // 0: there is no addend
  bool reduced_;
  OutputGradient<T> dy_;
  Operand<T> weight_, addend_, raw_;
  Norm norm_;
  Operand<T> x_;
  Operand<float> sums_;
};

// W: of the result.
template <class T, class W>
class WeightGradient {
 public:
  WeightGradient(const Convolution& of, const Arguments& arguments, Common& common)
      : of_(of),
        common_(common),
        normed_(arguments.flag("normed")),
        dy_(of, arguments, common),
        x_(elements_of(of.x_size()), common.random, common.values),
        norm_(normed_ ? of.c : 0, common),
        weight_(elements_of(of.weight_size())) {}

  RfConvBnWgrad problem() const {
    RfConvBnWgrad problem{};
    problem.product = problem_of<RfConvGradient>(of_, common_);
    dy_.place(problem.product);
    problem.product.x = x_.device.data();
    problem.product.weight = weight_.device.data();
    problem.coefficients = dy_.coefficients();
    problem.norm = norm_.device.data();
    problem.affine = dy_.affine();
    problem.normed = normed_;
    problem.weight_dtype =
        std::is_same_v<W, T> ? problem.product.dtype : static_cast<int32_t>(DataType::kFloat32);
    return problem;
  }

  // Where nothing is launched, the zeros are the caller's to write.
  void judge(bool launched, Verdict& verdict) {
    if (!launched) return;
    weight_.fetch();
    const std::vector<double> dy = dy_.values();
    const NormedRead<T> read(x_, normed_ ? &norm_ : nullptr, of_.x_at().stride[1]);
    std::vector<Sum> sums(weight_.host.size());
    for_each_product(of_, [&](int64_t x, int64_t weight, int64_t out) {
      sums[static_cast<size_t>(weight)].add(dy[static_cast<size_t>(out)] * read.at(x));
    });
    const double error = sum_error<T>(common_, of_.n * of_.p() * of_.q());
    for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i) {
      const Sum& sum = sums[static_cast<size_t>(i)];
      verdict.rounded<W>(weight_.at(i), sum.value, error * sum.magnitude, common_.values);
    }
  }

 private:
  const Convolution& of_;
  const Common& common_;
  bool normed_;
  OutputGradient<T> dy_;
  Operand<T> x_;
  Norm norm_;
  Operand<W> weight_;
};

template <class Problem, class Gradient>
bool run(const Interface<Problem>& op, Gradient gradient, const Arguments& arguments,
         const Common& common, Json& json) {
  const Planned<Problem> planned(op, gradient.problem(), arguments, json);
  planned.launch();
  Verdict verdict;
  gradient.judge(planned.launches(), verdict);
  const bool right = report(verdict, json);
  report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
  return right;
}

}  // namespace

bool run_conv_bn_dgrad(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kDgrad.name, arguments);
  const Convolution of(arguments);
  return with_conv_type(kDgrad.name, common.dtype, [&]<class T>() {
    return run(kDgrad, InputGradient<T>(of, arguments, common), arguments, common, json);
  });
}

bool run_conv_bn_wgrad(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kWgrad.name, arguments);
  const Convolution of(arguments);
  return with_conv_type(kWgrad.name, common.dtype, [&]<class T>() {
    const auto run_into = [&]<class W>(WeightGradient<T, W> gradient) {
      return run(kWgrad, std::move(gradient), arguments, common, json);
    };
    if (arguments.flag("float-weight")) {
      return run_into(WeightGradient<T, float>(of, arguments, common));
    }
    return run_into(WeightGradient<T, T>(of, arguments, common));
  });
}

}  // namespace resnet_fused::driver
