#include "../launch/conv_gradients.h"

#include <algorithm>

#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

using Pair = std::array<int64_t, 2>;
// Multiprocessors, shared memory a block and a multiprocessor may have, in bytes.
using Gpu = std::array<int32_t, 3>;

template <class Source, size_t kCount>
void fill(int64_t (&to)[kCount], const Source& from) {
  std::copy(from.begin(), from.end(), to);
}

// The C interface of one of the two ops.
struct Op {
  const char* name;
  decltype(&rf_conv_dgrad_configurations) configurations;
  decltype(&rf_conv_dgrad_configuration) configuration;
  decltype(&rf_conv_dgrad_plan) plan;
  decltype(&rf_conv_dgrad_cuda) run;
};
constexpr Op kOps[] = {
    {"conv_dgrad", rf_conv_dgrad_configurations, rf_conv_dgrad_configuration, rf_conv_dgrad_plan,
     rf_conv_dgrad_cuda},
    {"conv_wgrad", rf_conv_wgrad_configurations, rf_conv_wgrad_configuration, rf_conv_wgrad_plan,
     rf_conv_wgrad_cuda},
};

RfConvPlan plan_of(const Op& op, const RfConvGradient& problem, const Gpu& gpu,
                   int32_t configuration, int32_t splits, std::string* reason = nullptr) {
  const RfGpu limits{gpu[0], gpu[1], gpu[2]};
  RfConvPlan plan;
  char why[512] = "";
  if (op.plan(&problem, &limits, configuration, splits, &plan, why, sizeof why) != 0) {
    throw std::invalid_argument(why);
  }
  if (reason != nullptr) *reason = why;
  return plan;
}

py::dict describe(const Op& op, const RfConvGradient& problem, const Gpu& gpu,
                  int32_t configuration, int32_t splits) {
  std::string why;
  const RfConvPlan made = plan_of(op, problem, gpu, configuration, splits, &why);
  py::dict result;
  result["configuration"] = made.configuration;
  result["splits"] = made.splits;
  result["workspace_bytes"] = made.workspace_bytes;
  result["launches"] = made.launches;
  result["blocks"] = made.blocks;
  result["why"] = why;
  return result;
}

py::list configurations(const Op& op) {
  py::list all;
  for (int32_t i = 0; i < op.configurations(); ++i) {
    const RfConvConfiguration& one = *op.configuration(i);
    py::dict entry;
    entry["name"] = one.name;
    entry["wide"] = one.wide != 0;
    entry["m"] = one.m;
    entry["n"] = one.n;
    entry["warps"] = one.warps_m * one.warps_n;
    entry["stages"] = one.stages;
    entry["blocks"] = one.blocks;
    entry["step_bytes"] = one.step_bytes;
    entry["shared_bytes"] = one.shared_bytes;
    entry["float32"] = one.float32 != 0;
    all.append(entry);
  }
  return all;
}

RfConvGradient problem(const std::string& dtype, bool allow_tf32, uintptr_t dy, uintptr_t y,
                       uintptr_t x, uintptr_t weight, uintptr_t scale, const Sizes& x_size,
                       const Sizes& weight_size, const Sizes& dy_stride, const Sizes& y_stride,
                       const Sizes& x_stride, const Sizes& weight_stride, const Pair& stride,
                       const Pair& padding, const Pair& dilation, int32_t groups) {
  RfConvGradient made{};
  made.dy = pointer<const void>(dy);
  made.y = pointer<const void>(y);
  made.x = pointer<void>(x);
  made.weight = pointer<void>(weight);
  made.scale = pointer<const void>(scale);
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.allow_tf32 = allow_tf32;
  made.groups = groups;
  fill(made.x_size, x_size);
  fill(made.weight_size, weight_size);
  fill(made.dy_stride, dy_stride);
  fill(made.y_stride, y_stride);
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  fill(made.stride, stride);
  fill(made.padding, padding);
  fill(made.dilation, dilation);
  return made;
}

}  // namespace

void define_conv_gradients(py::module_& module) {
  py::class_<RfConvGradient>(module, "ConvGradient")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("allow_tf32"),
           py::arg("dy"), py::arg("y"), py::arg("x"), py::arg("weight"), py::arg("scale"),
           py::arg("x_size"), py::arg("weight_size"), py::arg("dy_stride"), py::arg("y_stride"),
           py::arg("x_stride"), py::arg("weight_stride"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"));
  for (const Op& op : kOps) {
    const std::string name = op.name;
    module.def((name + "_configurations").c_str(), [&op] { return configurations(op); });
    module.def(
        (name + "_plan").c_str(),
        [&op](const RfConvGradient& problem, const Gpu& gpu, int32_t configuration,
              int32_t splits) { return describe(op, problem, gpu, configuration, splits); },
        "What would be launched; ValueError says why nothing can be. A configuration of -1 and 0 "
        "splits leave the choice to the chooser.",
        py::arg("problem"), py::arg("gpu"), py::arg("configuration") = -1, py::arg("splits") = 0);
    module.def(
        name.c_str(),
        [&op](const Settings& settings, const RfConvGradient& problem, const Gpu& gpu,
              int32_t configuration, int32_t splits, uintptr_t workspace) {
          const RfConvPlan made = plan_of(op, problem, gpu, configuration, splits);
          return run(settings,
                     [&] { return op.run(&problem, &made, pointer<void>(workspace), nullptr); });
        },
        "The gradient; see csrc/launch/conv_gradients.h.", py::arg("settings"), py::arg("problem"),
        py::arg("gpu"), py::arg("configuration"), py::arg("splits"), py::arg("workspace"));
  }
}

}  // namespace resnet_fused::emulated
