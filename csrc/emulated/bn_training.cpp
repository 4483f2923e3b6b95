#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "../launch/bn_pass.h"
#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

// Address and strides of an activation.
using Operand = std::pair<uintptr_t, Sizes>;

struct Pass {
  BnTrainingOp op;
  int (*run)(const BnTrainingCall*, const RfBnPassPlan*, void*, void*);
};

const std::map<std::string, Pass> kPasses = {
    {"bn_add_act", {BnTrainingOp::kForward, rf_bn_add_act_cuda}},
    {"bn_add_act_backward", {BnTrainingOp::kBackward, rf_bn_add_act_backward_cuda}},
    {"bn_backward_apply", {BnTrainingOp::kApply, rf_bn_backward_apply_cuda}},
    {"bn_act_pool", {BnTrainingOp::kPool, rf_bn_act_pool_cuda}},
    {"bn_act_pool_backward", {BnTrainingOp::kPoolBackward, rf_bn_act_pool_backward_cuda}},
};

// Kernel, step, padding and windows; taps where they lie.
using Window = std::array<std::array<int64_t, 2>, 4>;

BnTrainingCall made(const std::string& op, const std::string& dtype, bool relu, const Sizes& size,
                    const std::map<std::string, Operand>& operands, uintptr_t norm,
                    uintptr_t residual_norm, uintptr_t sums, int32_t rows, int64_t offset,
                    int64_t held, const std::optional<Window>& window, const Operand& taps) {
  static const std::map<std::string, BnTrainingOperandIndex> places = {{"y", kRaw},
                                                                       {"gradient", kGradient},
                                                                       {"passed", kPassed},
                                                                       {"residual", kResidual},
                                                                       {"result", kResult}};
  BnTrainingCall call{};
  call.op = kPasses.at(op).op;
  call.dtype = data_type(dtype);
  call.relu = relu;
  std::copy(size.begin(), size.end(), call.size);
  for (const auto& [name, operand] : operands) {
    BnTrainingOperand& to = call.operand[places.at(name)];
    to.data = pointer<void>(operand.first);
    std::copy(operand.second.begin(), operand.second.end(), to.stride);
  }
  call.residual_first = offset;
  call.residual_channels = held;
  call.norm = pointer<const void>(norm);
  call.residual_norm = pointer<const void>(residual_norm);
  call.sums = pointer<void>(sums);
  call.rows = rows;
  if (window) {
    int64_t (*const to[4])[2] = {&call.pool.kernel, &call.pool.step, &call.pool.padding,
                                 &call.pool.windows};
    for (int i = 0; i < 4; ++i) std::copy((*window)[i].begin(), (*window)[i].end(), *to[i]);
    call.pool.taps = pointer<uint8_t>(taps.first);
    std::copy(taps.second.begin(), taps.second.end(), call.pool.taps_stride);
  }
  return call;
}

RfBnPassPlan planned(const BnTrainingCall& call) {
  RfBnPassPlan plan;
  char why[256] = "";
  if (rf_bn_pass_plan(&call, &plan, why, sizeof why) != 0) throw std::invalid_argument(why);
  return plan;
}

py::dict described(const BnTrainingCall& call) {
  const RfBnPassPlan plan = planned(call);
  py::dict result;
  result["wide"] = plan.wide != 0;
  result["dense"] = plan.dense != 0;
  result["columns"] = plan.columns;
  result["rows"] = plan.rows;
  result["ahead"] = plan.ahead;
  result["groups"] = plan.groups;
  result["parts"] = plan.parts;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

py::dict run_pass(const Settings& settings, const std::string& op, const BnTrainingCall& call,
                  uintptr_t workspace) {
  const RfBnPassPlan plan = planned(call);
  return run(settings,
             [&] { return kPasses.at(op).run(&call, &plan, pointer<void>(workspace), nullptr); });
}

}  // namespace

void define_bn_training(py::module_& module) {
  py::class_<BnTrainingCall>(module, "BnPass")
      .def(py::init(&made), py::kw_only(), py::arg("op"), py::arg("dtype"), py::arg("relu"),
           py::arg("size"), py::arg("operands"), py::arg("norm"), py::arg("residual_norm"),
           py::arg("sums"), py::arg("rows"), py::arg("offset"), py::arg("held"),
           py::arg("window") = std::nullopt, py::arg("taps") = Operand{});
  module.def("bn_pass_plan", &described, "How a pass of training would be cut into blocks.",
             py::arg("problem"));
  module.def("bn_pass", &run_pass, "A pass of training; see csrc/launch/bn_pass.h.",
             py::arg("settings"), py::arg("op"), py::arg("problem"), py::arg("workspace"));
}

}  // namespace resnet_fused::emulated
