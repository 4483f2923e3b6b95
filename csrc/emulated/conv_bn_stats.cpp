#include "../launch/conv_bn_stats.h"

#include <optional>
#include <utility>

#include "../launch/conv_bn_stats_arguments.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnStats problem(const std::string& dtype, bool allow_tf32, uintptr_t x, uintptr_t norm,
                      uintptr_t weight, uintptr_t y, uintptr_t stats, const Sizes& x_size,
                      const Sizes& weight_size, const Sizes& x_stride, const Sizes& weight_stride,
                      const Sizes& y_stride, const Pair& stride, const Pair& padding,
                      const Pair& dilation, int32_t groups) {
  RfConvBnStats made{};
  made.conv.x = pointer<const void>(x);
  made.conv.weight = pointer<const void>(weight);
  made.conv.out = pointer<void>(y);
  made.norm = pointer<const void>(norm);
  made.normed = norm != 0;
  made.stats = pointer<void>(stats);
  fill(made.conv.x_stride, x_stride);
  fill(made.conv.weight_stride, weight_stride);
  fill(made.conv.out_stride, y_stride);
  fill_geometry(made.conv, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation,
                groups);
  return made;
}

// Address, and whether it is of doubles.
using Values = std::pair<uintptr_t, bool>;

// The problem, whose output's BatchNorm is finalized in the same launch; `factor` none: 1 /
// tracked.
RfConvBnStats finalizing(RfConvBnStats made, uintptr_t norm, const Values& gamma,
                         const Values& beta, double eps, const Values& mean, const Values& variance,
                         uintptr_t kept, uintptr_t tracked, bool tracked_is_long,
                         std::optional<double> factor) {
  const auto vector = [](const Values& values) {
    return ChannelVector{pointer<void>(values.first), values.second};
  };
  made.finalized = {
      pointer<void>(norm), vector(gamma),    vector(beta),        eps,
      vector(mean),        vector(variance), pointer<void>(kept), pointer<void>(tracked),
      tracked_is_long,     !factor,          factor.value_or(0)};
  return made;
}

const Convolution<RfConvBnStats> kConvBnStats{
    "conv_bn_stats",
    "y = conv(relu(scale x + shift), weight), and its statistics; see "
    "csrc/launch/conv_bn_stats.h.",
    rf_conv_bn_stats_configurations,
    rf_conv_bn_stats_configuration,
    rf_conv_bn_stats_plan,
    rf_conv_bn_stats_cuda};

// The plan as if a launch took no more than `images`: what a batch of 2^31 pixels comes to.
RfConvPlan cut(const RfConvBnStats& problem, const Gpu& gpu, int32_t index, int32_t splits,
               int64_t images) {
  RfConvPlan plan = kConvBnStats.planned(problem, gpu, index, splits);
  plan.images_a_launch = images;
  plan.launches = (problem.conv.x_size[0] + images - 1) / images;
  const RfConvConfiguration& tile = *rf_conv_bn_stats_configuration(plan.configuration);
  plan.workspace_bytes = stats_layout(problem, tile, plan.splits, images).bytes;
  return plan;
}

}  // namespace

void define_conv_bn_stats(py::module_& module) {
  py::class_<RfConvBnStats>(module, "ConvBnStats")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("allow_tf32"), py::arg("x"),
           py::arg("norm"), py::arg("weight"), py::arg("y"), py::arg("stats"), py::arg("x_size"),
           py::arg("weight_size"), py::arg("x_stride"), py::arg("weight_stride"),
           py::arg("y_stride"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
           py::arg("groups"))
      .def("finalizing", &finalizing, "The problem, finalized; see RfStatsNorm.", py::kw_only(),
           py::arg("norm"), py::arg("gamma"), py::arg("beta"), py::arg("eps"),
           py::arg("running_mean"), py::arg("running_var"), py::arg("kept"), py::arg("tracked"),
           py::arg("tracked_is_long"), py::arg("factor"));
  define(module, kConvBnStats);
  module.def(
      "conv_bn_stats_cut_bytes",
      [](const RfConvBnStats& problem, const Gpu& gpu, int32_t index, int32_t splits,
         int64_t images) { return cut(problem, gpu, index, splits, images).workspace_bytes; },
      "Bytes of the workspace of conv_bn_stats_cut.");
  module.def(
      "conv_bn_stats_cut",
      [](const Settings& settings, const RfConvBnStats& problem, const Gpu& gpu, int32_t index,
         int32_t splits, int64_t images, uintptr_t workspace) {
        const RfConvPlan plan = cut(problem, gpu, index, splits, images);
        return run(settings, [&] {
          return rf_conv_bn_stats_cuda(&problem, &plan, pointer<void>(workspace), nullptr);
        });
      },
      "conv_bn_stats in launches of so many images.");
}

}  // namespace resnet_fused::emulated
