// What the driver's passes of training share: their images and per-channel values, the launch, and
// the judgement of their sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../launch/bn_pass.h"
#include "conv.h"

namespace resnet_fused::driver {

// The C interface of one pass.
struct PassInterface {
  const char* name;
  BnTrainingOp op;
  int (*run)(const BnTrainingCall*, const RfBnPassPlan*, void*, void*);
};

// Images of one size and layout, all of a call.
struct Images {
  Size size;
  bool channels_last;

  explicit Images(const Arguments& arguments)
      : size{arguments.integer("n", 0), arguments.integer("c", 1), arguments.integer("h", 1),
             arguments.integer("w", 1)},
        channels_last(arguments.choice("layout", {"nchw", "nhwc"}) == 1) {}

  int64_t channels() const { return size[1]; }
  int64_t elements() const { return elements_of(size); }
  Layout at() const { return {size, channels_last}; }
  int64_t channel(int64_t place) const { return place / at().stride[1] % size[1]; }
};

// A BatchNorm's [4, C]: scale, shift, mean, invstd.
struct Norm : Operand<float> {
  int64_t channels;

  Norm(int64_t channels, Common& common)
      : Operand<float>(4 * channels, common.random, common.values), channels(channels) {}
  double scale(int64_t c) const { return at(c); }
  double shift(int64_t c) const { return at(channels + c); }
  double mean(int64_t c) const { return at(2 * channels + c); }
};

// Errors of an fma and a sum in float32, in parts of their terms' magnitudes.
constexpr double kAffineError = 4 * kUnitRoundoff<float>;

// y through a BatchNorm, rounded to T: where it is not above 0, a ReLU's gradient does not pass.
template <class T>
double normalised(const Norm& norm, int64_t channel, double y) {
  return to_double(round_to<T>(norm.scale(channel) * y + norm.shift(channel)));
}

// The call, but for its operands and values.
inline BnTrainingCall pass_call(const PassInterface& pass, const Images& of, const Common& common,
                                const Arguments& arguments) {
  BnTrainingCall call{};
  call.op = pass.op;
  call.dtype = common.dtype;
  call.relu = arguments.choice("act", {"none", "relu"}) == 1;
  copy_to(call.size, of.size);
  return call;
}

// An operand that has no elements is absent.
template <class T>
void place(BnTrainingCall& call, BnTrainingOperandIndex index, const Operand<T>& operand,
           const Layout& at) {
  call.operand[index].data = operand.host.empty() ? nullptr : operand.device.data();
  copy_to(call.operand[index].stride, at.stride);
}

// A call with its plan and workspace.
class PlannedPass {
 public:
  // Adds "plan" to the record; throws UsageError where there is none.
  PlannedPass(const PassInterface& pass, const BnTrainingCall& call, Json& json)
      : pass_(pass), call_(call), plan_(plan(call, json)) {
    // In any state: NaN, and no count that is right.
    const std::vector<uint8_t> poison(static_cast<size_t>(plan_.workspace_bytes), 0xFF);
    workspace_.copy_from(poison.data());
  }
  void launch() const { check(pass_.run(&call_, &plan_, workspace_.data(), nullptr), pass_.name); }

 private:
  static RfBnPassPlan plan(const BnTrainingCall& call, Json& json) {
    RfBnPassPlan plan;
    char text[256] = "";
    if (rf_bn_pass_plan(&call, &plan, text, sizeof text) != 0) {
      throw UsageError(std::string("no plan: ") + text);
    }
    std::snprintf(text, sizeof text,
                  "%lld x %lld blocks of %d x %d threads, %s loads, %d ahead, %s",
                  static_cast<long long>(plan.groups), static_cast<long long>(plan.parts),
                  plan.columns, plan.rows, plan.wide != 0 ? "wide" : "narrow", plan.ahead,
                  plan.dense != 0 ? "one loop of pixels" : "several loops of pixels");
    json.add("plan", text);
    return plan;
  }

  const PassInterface& pass_;
  BnTrainingCall call_;
  RfBnPassPlan plan_;
  Buffer workspace_{static_cast<size_t>(plan_.workspace_bytes)};
};

// A BatchNorm's raw output with its values.
template <class T>
struct Branch {
  const Operand<T>& raw;
  const Norm& norm;
};

// Sums of dz, and of dz (raw - mean) of each branch, [1 + branches, C]: of dz as it was stored, all
// in float32.
template <class T>
void judge_sums(const Images& of, const Operand<T>& dz, const std::vector<Branch<T>>& branches,
                const Operand<float>& sums, Values values, Verdict& verdict) {
  const int64_t channels = of.channels(), rows = 1 + static_cast<int64_t>(branches.size());
  std::vector<Sum> expected(static_cast<size_t>(rows * channels));
  for (int64_t i = 0; i < of.elements(); ++i) {
    const int64_t c = of.channel(i);
    expected[static_cast<size_t>(c)].add(dz.at(i));
    for (int64_t row = 1; row < rows; ++row) {
      const Branch<T>& branch = branches[static_cast<size_t>(row - 1)];
      expected[static_cast<size_t>(row * channels + c)].add(
          dz.at(i) * (branch.raw.at(i) - branch.norm.mean(c)));
    }
  }
  const auto pixels = static_cast<double>(of.elements() / channels);
  const double error = walk_error(std::sqrt(pixels));
  for (int64_t i = 0; i < rows * channels; ++i) {
    const Sum& sum = expected[static_cast<size_t>(i)];
    if (values == Values::kIntegers) {
      verdict.equal(sums.at(i), sum.value);
    } else {
      verdict.within(sums.at(i), sum.value, error * sum.magnitude + kHalfSubnormal<float>);
    }
  }
}

// Runs a pass once, checks and times it. Op<T>: its operands; call(), fetch(), judge(verdict).
template <template <class> class Op>
bool run_pass(const PassInterface& pass, const Arguments& arguments, Common& common, Json& json) {
  return with_conv_type(pass.name, common.dtype, [&]<class T>() {
    Op<T> op(arguments, common);
    const PlannedPass planned(pass, op.call(), json);
    planned.launch();
    op.fetch();
    Verdict verdict;
    op.judge(verdict);
    const bool right = report(verdict, json);
    report_times(time_calls(common.repeats, [&] { planned.launch(); }), json);
    return right;
  });
}

}  // namespace resnet_fused::driver
