#include "../launch/bn_add_act_conv_stats.h"

#include "../launch/bn_add_act_conv_stats_arguments.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfBnAddActConvStats problem(const std::string& dtype, bool allow_tf32, uintptr_t y, uintptr_t norm,
                            uintptr_t residual, uintptr_t residual_norm, uintptr_t weight,
                            uintptr_t out, uintptr_t z, uintptr_t stats, const Sizes& y_size,
                            const Sizes& weight_size, const Sizes& y_stride,
                            const Sizes& residual_stride, const Sizes& weight_stride,
                            const Sizes& out_stride, const Sizes& z_stride, const Pair& stride,
                            const Pair& padding, const Pair& dilation, int32_t groups) {
  RfBnAddActConvStats made{};
  RfConvBnStats& measured = made.stats;
  measured.conv.x = pointer<const void>(y);
  measured.conv.weight = pointer<const void>(weight);
  measured.conv.out = pointer<void>(z);
  measured.norm = pointer<const void>(norm);
  measured.normed = norm != 0;
  measured.stats = pointer<void>(stats);
  made.residual = pointer<const void>(residual);
  made.residual_norm = pointer<const void>(residual_norm);
  made.projected = residual_norm != 0;
  made.out = pointer<void>(out);
  fill(measured.conv.x_stride, y_stride);
  fill(measured.conv.weight_stride, weight_stride);
  fill(measured.conv.out_stride, z_stride);
  fill(made.residual_stride, residual_stride);
  fill(made.out_stride, out_stride);
  fill_geometry(measured.conv, dtype, allow_tf32, y_size, weight_size, stride, padding, dilation,
                groups);
  return made;
}

const Convolution<RfBnAddActConvStats> kOp{
    "bn_add_act_conv_stats",
    "A block's end, the 1x1 convolution behind it and its statistics; see "
    "csrc/launch/bn_add_act_conv_stats.h.",
    rf_bn_add_act_conv_stats_configurations,
    rf_bn_add_act_conv_stats_configuration,
    rf_bn_add_act_conv_stats_plan,
    rf_bn_add_act_conv_stats_cuda};

// The plan as if a launch took no more than `images`: what a batch of 2^31 pixels comes to.
RfConvPlan cut(const RfBnAddActConvStats& problem, const Gpu& gpu, int32_t index, int32_t splits,
               int64_t images) {
  RfConvPlan plan = kOp.planned(problem, gpu, index, splits);
  plan.images_a_launch = images;
  plan.launches = (problem.stats.conv.x_size[0] + images - 1) / images;
  const RfConvConfiguration& tile = *rf_bn_add_act_conv_stats_configuration(plan.configuration);
  plan.workspace_bytes = stats_layout(problem.stats, tile, plan.splits, images).bytes;
  return plan;
}

}  // namespace

void define_bn_add_act_conv_stats(py::module_& module) {
  py::class_<RfBnAddActConvStats>(module, "BnAddActConvStats")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("allow_tf32"), py::arg("y"),
           py::arg("norm"), py::arg("residual"), py::arg("residual_norm"), py::arg("weight"),
           py::arg("out"), py::arg("z"), py::arg("stats"), py::arg("y_size"),
           py::arg("weight_size"), py::arg("y_stride"), py::arg("residual_stride"),
           py::arg("weight_stride"), py::arg("out_stride"), py::arg("z_stride"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"), py::arg("groups"));
  define(module, kOp);
  module.def(
      "bn_add_act_conv_stats_cut_bytes",
      [](const RfBnAddActConvStats& problem, const Gpu& gpu, int32_t index, int32_t splits,
         int64_t images) { return cut(problem, gpu, index, splits, images).workspace_bytes; },
      "Bytes of the workspace of bn_add_act_conv_stats_cut.");
  module.def(
      "bn_add_act_conv_stats_cut",
      [](const Settings& settings, const RfBnAddActConvStats& problem, const Gpu& gpu,
         int32_t index, int32_t splits, int64_t images, uintptr_t workspace) {
        const RfConvPlan plan = cut(problem, gpu, index, splits, images);
        return run(settings, [&] {
          return rf_bn_add_act_conv_stats_cuda(&problem, &plan, pointer<void>(workspace), nullptr);
        });
      },
      "bn_add_act_conv_stats in launches of so many images.");
}

}  // namespace resnet_fused::emulated
