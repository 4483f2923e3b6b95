// What the driver's passes of training share: the call, its launch and the run.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../launch/bn_pass.h"
#include "bn_operands.h"

namespace resnet_fused::driver {

// The C interface of one pass.
struct PassInterface {
  const char* name;
  BnTrainingOp op;
  int (*run)(const BnTrainingCall*, const RfBnPassPlan*, void*, void*);
};

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
