#include "../launch/conv_bn_act.h"

#include <algorithm>

#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

using Pair = std::array<int64_t, 2>;

template <class Source, size_t kCount>
void fill(int64_t (&to)[kCount], const Source& from) {
  std::copy(from.begin(), from.end(), to);
}

// Multiprocessors, shared memory a block and a multiprocessor may have, in bytes.
using Gpu = std::array<int32_t, 3>;

RfConvPlan plan_of(const RfConvBnAct& problem, const Gpu& gpu, int32_t configuration,
                   int32_t splits, std::string* reason = nullptr) {
  const RfGpu limits{gpu[0], gpu[1], gpu[2]};
  RfConvPlan plan;
  char why[512] = "";
  if (rf_conv_bn_act_plan(&problem, &limits, configuration, splits, &plan, why, sizeof why) != 0) {
    throw std::invalid_argument(why);
  }
  if (reason != nullptr) *reason = why;
  return plan;
}

py::dict plan(const RfConvBnAct& problem, const Gpu& gpu, int32_t configuration, int32_t splits) {
  std::string why;
  const RfConvPlan made = plan_of(problem, gpu, configuration, splits, &why);
  py::dict result;
  result["configuration"] = made.configuration;
  result["splits"] = made.splits;
  result["workspace_bytes"] = made.workspace_bytes;
  result["launches"] = made.launches;
  result["blocks"] = made.blocks;
  result["why"] = why;
  return result;
}

py::dict conv_bn_act(const Settings& settings, const RfConvBnAct& problem, const Gpu& gpu,
                     int32_t configuration, int32_t splits, uintptr_t workspace) {
  const RfConvPlan made = plan_of(problem, gpu, configuration, splits);
  return run(settings, [&] {
    return rf_conv_bn_act_cuda(&problem, &made, pointer<void>(workspace), nullptr);
  });
}

py::list configurations() {
  py::list all;
  for (int32_t i = 0; i < rf_conv_bn_act_configurations(); ++i) {
    const RfConvConfiguration& one = *rf_conv_bn_act_configuration(i);
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

RfConvBnAct problem(const std::string& dtype, bool relu, bool allow_tf32, uintptr_t x,
                    uintptr_t weight, uintptr_t residual, uintptr_t scale, uintptr_t shift,
                    uintptr_t out, const Sizes& x_size, const Sizes& weight_size,
                    const Sizes& x_stride, const Sizes& weight_stride, const Sizes& residual_stride,
                    const Sizes& out_stride, const Pair& stride, const Pair& padding,
                    const Pair& dilation, int32_t groups) {
  RfConvBnAct made{};
  made.x = pointer<const void>(x);
  made.weight = pointer<const void>(weight);
  made.residual = pointer<const void>(residual);
  made.scale = pointer<const void>(scale);
  made.shift = pointer<const void>(shift);
  made.out = pointer<void>(out);
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.relu = relu;
  made.allow_tf32 = allow_tf32;
  made.groups = groups;
  fill(made.x_size, x_size);
  fill(made.weight_size, weight_size);
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  fill(made.residual_stride, residual_stride);
  fill(made.out_stride, out_stride);
  fill(made.stride, stride);
  fill(made.padding, padding);
  fill(made.dilation, dilation);
  return made;
}

}  // namespace

void define_conv_bn_act(py::module_& module) {
  py::class_<RfConvBnAct>(module, "ConvBnAct")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("relu"),
           py::arg("allow_tf32"), py::arg("x"), py::arg("weight"), py::arg("residual"),
           py::arg("scale"), py::arg("shift"), py::arg("out"), py::arg("x_size"),
           py::arg("weight_size"), py::arg("x_stride"), py::arg("weight_stride"),
           py::arg("residual_stride"), py::arg("out_stride"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"));
  module.def("conv_bn_act_configurations", &configurations);
  module.def("conv_bn_act_plan", &plan,
             "What would be launched; ValueError says why nothing can be. A configuration of -1 "
             "and 0 splits leave the choice to the chooser.",
             py::arg("problem"), py::arg("gpu"), py::arg("configuration") = -1,
             py::arg("splits") = 0);
  module.def("conv_bn_act", &conv_bn_act,
             "y = act(scale conv(x, weight) + shift [+ residual]); see csrc/launch/conv_bn_act.h.",
             py::arg("settings"), py::arg("problem"), py::arg("gpu"), py::arg("configuration"),
             py::arg("splits"), py::arg("workspace"));
}

}  // namespace resnet_fused::emulated
