#include "../launch/conv_bn_dgrad.h"
#include "../launch/conv_bn_dgrad_end.h"
#include "../launch/conv_bn_grad1x1.h"
#include "../launch/conv_bn_grad1x1_end.h"
#include "../launch/conv_bn_wgrad.h"
#include "bn_operands.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnDgrad> kDgrad = {"conv_bn_dgrad", rf_conv_bn_dgrad_configurations,
                                             rf_conv_bn_dgrad_configuration, rf_conv_bn_dgrad_plan,
                                             rf_conv_bn_dgrad_cuda};
constexpr Interface<RfConvBnDgradEnd> kDgradEnd = {
    "conv_bn_dgrad_end", rf_conv_bn_dgrad_end_configurations, rf_conv_bn_dgrad_end_configuration,
    rf_conv_bn_dgrad_end_plan, rf_conv_bn_dgrad_end_cuda};
constexpr Interface<RfConvBnWgrad> kWgrad = {"conv_bn_wgrad", rf_conv_bn_wgrad_configurations,
                                             rf_conv_bn_wgrad_configuration, rf_conv_bn_wgrad_plan,
                                             rf_conv_bn_wgrad_cuda};
constexpr Interface<RfConvBnGrad1x1> kGrad1x1 = {
    "conv_bn_grad1x1", rf_conv_bn_grad1x1_configurations, rf_conv_bn_grad1x1_configuration,
    rf_conv_bn_grad1x1_plan, rf_conv_bn_grad1x1_cuda};
constexpr Interface<RfConvBnGrad1x1End> kGrad1x1End = {
    "conv_bn_grad1x1_end", rf_conv_bn_grad1x1_end_configurations,
    rf_conv_bn_grad1x1_end_configuration, rf_conv_bn_grad1x1_end_plan, rf_conv_bn_grad1x1_end_cuda};

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

// What both gradients of a convolution are made of: dy, and x, which is a BatchNorm's raw output
// with --normed.
template <class T>
struct Given {
  OutputGradient<T> dy;
  Operand<T> x;
  bool normed;
  Norm norm;

  Given(const Convolution& of, const Arguments& arguments, Common& common)
      : Given(of, arguments, common, arguments.flag("normed")) {}
  Given(const Convolution& of, const Arguments& arguments, Common& common, bool normed)
      : dy(of, arguments, common),
        x(elements_of(of.x_size()), common.random, common.values),
        normed(normed),
        norm(normed ? of.c : 0, common) {}

  const Norm* below() const { return normed ? &norm : nullptr; }
};

// The end of a block that stands below: its output, and with --residual a projection's raw output,
// behind a BatchNorm of its own.
template <class T>
struct BlockEnd {
  Operand<T> out;
  bool projected;
  Operand<T> residual;
  Norm residual_norm;

  BlockEnd(const Convolution& of, const Arguments& arguments, Common& common)
      : out(elements_of(of.x_size()), common.random, common.values),
        projected(arguments.flag("residual")),
        residual(projected ? elements_of(of.x_size()) : 0, common.random, common.values),
        residual_norm(projected ? of.c : 0, common) {}
};

// x's gradient through the convolution, what comes through a shortcut added, masked and reduced.
template <class T>
class InputGradient {
 public:
  // end: null, where a BatchNorm and a ReLU stand below, or nothing does.
  InputGradient(const Convolution& of, const Arguments& arguments, Common& common,
                const Given<T>& given, const BlockEnd<T>* end = nullptr)
      : of_(of),
        common_(common),
        given_(given),
        end_(end),
        images_(arguments),
        step_(arguments.integer("addend", 0)),
        weight_(elements_of(of.weight_size()), common.random, common.values),
        addend_(elements_of(addend_size()), common.random, common.values),
        x_(images_.elements()),
        sums_(given.normed ? (end != nullptr && end->projected ? 3 : 2) * of.c : 0) {}

  RfConvBnDgrad problem() const {
    RfConvBnDgrad problem{};
    problem.conv = problem_of<RfConvGradient>(of_, common_);
    given_.dy.place(problem.conv);
    problem.conv.scale = given_.dy.coefficients();
    problem.conv.weight = weight_.device.data();
    problem.conv.x = x_.device.data();
    problem.addend = addend_.device.data();
    problem.raw = given_.x.device.data();
    problem.norm = given_.norm.device.data();
    problem.sums = sums_.device.data();
    problem.affine = given_.dy.affine();
    problem.added = step_ != 0;
    problem.reduced = given_.normed;
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
    const std::vector<double> dy = given_.dy.values();
    std::vector<Sum> sums(x_.host.size());
    for_each_product(of_, [&](int64_t x, int64_t weight, int64_t out) {
      sums[static_cast<size_t>(x)].add(dy[static_cast<size_t>(out)] * weight_.at(weight));
    });
    add(sums);
    const double error = sum_error<T>(common_, of_.k / of_.groups * of_.r * of_.s);
    for (int64_t i = 0; i < images_.elements(); ++i) {
      const Sum& sum = sums[static_cast<size_t>(i)];
      if (masks(i)) {
        verdict.equal(x_.at(i), 0);
      } else {
        verdict.rounded<T>(x_.at(i), sum.value, error * sum.magnitude, common_.values);
      }
    }
    if (!given_.normed) return;
    std::vector<Branch<T>> branches{{given_.x, given_.norm}};
    if (end_ != nullptr && end_->projected) {
      branches.push_back({end_->residual, end_->residual_norm});
    }
    judge_sums<T>(images_, x_, branches, sums_, common_.values, verdict);
  }

 private:
  bool masks(int64_t i) const {
    if (end_ != nullptr) return end_->out.at(i) <= 0;
    return given_.normed && normalised<T>(given_.norm, images_.channel(i), given_.x.at(i)) <= 0;
  }
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
  const Given<T>& given_;
  const BlockEnd<T>* end_;
  Images images_;
  int64_t step_;  // 0: there is no addend
  Operand<T> weight_, addend_, x_;
  Operand<float> sums_;
};

// The same behind the ReLU of a block's end.
template <class T>
class EndGradient {
 public:
  EndGradient(const Convolution& of, const Arguments& arguments, Common& common,
              const Given<T>& given, const BlockEnd<T>& end)
      : of_(of), end_(end), input_(of, arguments, common, given, &end) {}

  RfConvBnDgradEnd problem() const {
    RfConvBnDgradEnd problem{};
    problem.image = input_.problem();
    problem.out = end_.out.device.data();
    problem.projected = end_.projected;
    problem.residual = end_.residual.device.data();
    problem.residual_norm = end_.residual_norm.device.data();
    copy_to(problem.out_stride, of_.x_at().stride);
    copy_to(problem.residual_stride, of_.x_at().stride);
    return problem;
  }

  void judge(bool launched, Verdict& verdict) { input_.judge(launched, verdict); }

 private:
  const Convolution& of_;
  const BlockEnd<T>& end_;
  InputGradient<T> input_;
};

// W: of the result.
template <class T, class W>
class WeightGradient {
 public:
  WeightGradient(const Convolution& of, const Common& common, const Given<T>& given)
      : WeightGradient(of, common, given.dy, given.x, given.below()) {}
  // norm: null, where the convolution read x as it is.
  WeightGradient(const Convolution& of, const Common& common, const OutputGradient<T>& dy,
                 const Operand<T>& x, const Norm* norm)
      : of_(of),
        common_(common),
        dy_(dy),
        x_(x),
        norm_(norm),
        weight_(elements_of(of.weight_size())) {}

  RfConvBnWgrad problem() const {
    RfConvBnWgrad problem{};
    problem.product = problem_of<RfConvGradient>(of_, common_);
    dy_.place(problem.product);
    problem.product.x = x_.device.data();
    problem.product.weight = weight_.device.data();
    problem.coefficients = dy_.coefficients();
    problem.norm = norm_ != nullptr ? norm_->device.data() : nullptr;
    problem.affine = dy_.affine();
    problem.normed = norm_ != nullptr;
    problem.weight_dtype = dtype();
    return problem;
  }
  // As a kernel of both gradients is told of it.
  template <class Problem>
  void place(Problem& problem) const {
    problem.dweight = weight_.device.data();
    problem.dweight_dtype = dtype();
    copy_to(problem.dweight_stride, of_.weight_at().stride);
  }

  // Where nothing is launched, the zeros are the caller's to write.
  void judge(bool launched, Verdict& verdict) {
    if (!launched) return;
    weight_.fetch();
    const std::vector<double> dy = dy_.values();
    const NormedRead<T> read(x_, norm_, of_.x_at().stride[1]);
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
  int32_t dtype() const {
    return static_cast<int32_t>(std::is_same_v<W, T> ? common_.dtype : DataType::kFloat32);
  }

  const Convolution& of_;
  const Common& common_;
  const OutputGradient<T>& dy_;
  const Operand<T>& x_;
  const Norm* norm_;
  Operand<W> weight_;
};

// Both of a 1x1 convolution, by one kernel. kImage: the member of Problem that is the input's.
template <class Problem, auto kImage, class Input, class Weight>
class BothGradients {
 public:
  BothGradients(const Input& input, const Weight& weight) : input_(input), weight_(weight) {}

  Problem problem() const {
    Problem problem{};
    problem.*kImage = input_.problem();
    weight_.place(problem);
    return problem;
  }

  void judge(bool launched, Verdict& verdict) {
    input_.judge(launched, verdict);
    weight_.judge(launched, verdict);
  }

 private:
  Input input_;
  Weight weight_;
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

// Calls body.operator()<T, W>(): dtypes of what is read, and of the weights' gradient.
template <class F>
bool with_weight_type(const char* op, const Arguments& arguments, const Common& common, F body) {
  return with_conv_type(op, common.dtype, [&]<class T>() {
    if (arguments.flag("float-weight")) return body.template operator()<T, float>();
    return body.template operator()<T, T>();
  });
}

}  // namespace

bool run_conv_bn_dgrad(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kDgrad.name, arguments);
  const Convolution of(arguments);
  return with_conv_type(kDgrad.name, common.dtype, [&]<class T>() {
    const Given<T> given(of, arguments, common);
    return run(kDgrad, InputGradient<T>(of, arguments, common, given), arguments, common, json);
  });
}

bool run_conv_bn_dgrad_end(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  return with_conv_type(kDgradEnd.name, common.dtype, [&]<class T>() {
    const Given<T> given(of, arguments, common, true);
    const BlockEnd<T> end(of, arguments, common);
    return run(kDgradEnd, EndGradient<T>(of, arguments, common, given, end), arguments, common,
               json);
  });
}

bool run_conv_bn_wgrad(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kWgrad.name, arguments);
  const Convolution of(arguments);
  return with_weight_type(kWgrad.name, arguments, common, [&]<class T, class W>() {
    const Given<T> given(of, arguments, common);
    return run(kWgrad, WeightGradient<T, W>(of, common, given), arguments, common, json);
  });
}

bool run_conv_bn_grad1x1(const Arguments& arguments, Common& common, Json& json) {
  refuse_residual(kGrad1x1.name, arguments);
  const Convolution of(arguments);
  return with_weight_type(kGrad1x1.name, arguments, common, [&]<class T, class W>() {
    const Given<T> given(of, arguments, common);
    using Input = InputGradient<T>;
    using Weight = WeightGradient<T, W>;
    const BothGradients<RfConvBnGrad1x1, &RfConvBnGrad1x1::image, Input, Weight> both(
        Input(of, arguments, common, given), Weight(of, common, given));
    return run(kGrad1x1, both, arguments, common, json);
  });
}

bool run_conv_bn_grad1x1_end(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  return with_weight_type(kGrad1x1End.name, arguments, common, [&]<class T, class W>() {
    const Given<T> given(of, arguments, common, true);
    const BlockEnd<T> end(of, arguments, common);
    using Input = EndGradient<T>;
    using Weight = WeightGradient<T, W>;
    const BothGradients<RfConvBnGrad1x1End, &RfConvBnGrad1x1End::end, Input, Weight> both(
        Input(of, arguments, common, given, end), Weight(of, common, given.dy, end.out, nullptr));
    return run(kGrad1x1End, both, arguments, common, json);
  });
}

}  // namespace resnet_fused::driver
