#include "../launch/conv_bn_dgrad.h"

#include "../launch/conv_bn_dgrad_arguments.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnDgrad problem(const std::string& dtype, bool allow_tf32, uintptr_t dz, uintptr_t y,
                      uintptr_t coefficients, uintptr_t weight, uintptr_t addend, uintptr_t raw,
                      uintptr_t norm, uintptr_t x, uintptr_t sums, int64_t addend_step,
                      const Sizes& x_size, const Sizes& weight_size, const Sizes& dz_stride,
                      const Sizes& y_stride, const Sizes& weight_stride, const Sizes& addend_stride,
                      const Sizes& raw_stride, const Sizes& x_stride, const Pair& stride,
                      const Pair& padding, const Pair& dilation, int32_t groups) {
  RfConvBnDgrad made{};
  made.conv.dy = pointer<const void>(dz);
  made.conv.y = pointer<const void>(y);
  made.conv.scale = pointer<const void>(coefficients);
  made.conv.weight = pointer<void>(weight);
  made.conv.x = pointer<void>(x);
  made.addend = pointer<const void>(addend);
  made.raw = pointer<const void>(raw);
  made.norm = pointer<const void>(norm);
  made.sums = pointer<void>(sums);
  made.affine = y != 0;
  made.added = addend != 0;
  made.reduced = raw != 0;
  made.addend_step = addend_step;
  fill(made.conv.dy_stride, dz_stride);
  fill(made.conv.y_stride, y_stride);
  fill(made.conv.x_stride, x_stride);
  fill(made.conv.weight_stride, weight_stride);
  fill(made.addend_stride, addend_stride);
  fill(made.raw_stride, raw_stride);
  fill_geometry(made.conv, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation,
                groups);
  return made;
}

const Convolution<RfConvBnDgrad> kConvBnDgrad{
    "conv_bn_dgrad",
    "The gradient of a convolution's input between two BatchNorms, and its reductions; see "
    "csrc/launch/conv_bn_dgrad.h.",
    rf_conv_bn_dgrad_configurations,
    rf_conv_bn_dgrad_configuration,
    rf_conv_bn_dgrad_plan,
    rf_conv_bn_dgrad_cuda};

// The plan as if a launch took no more than `images`: what a batch of 2^31 pixels comes to.
RfConvPlan cut(const RfConvBnDgrad& problem, const Gpu& gpu, int32_t index, int32_t splits,
               int64_t images) {
  RfConvPlan plan = kConvBnDgrad.planned(problem, gpu, index, splits);
  plan.images_a_launch = images;
  plan.launches = (problem.conv.x_size[0] + images - 1) / images;
  const RfConvConfiguration& tile = *rf_conv_bn_dgrad_configuration(plan.configuration);
  plan.workspace_bytes = bn_dgrad_layout(problem, tile, plan.splits, images).bytes;
  return plan;
}

}  // namespace

void define_conv_bn_dgrad(py::module_& module) {
  py::class_<RfConvBnDgrad>(module, "ConvBnDgrad")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("allow_tf32"),
           py::arg("dz"), py::arg("y"), py::arg("coefficients"), py::arg("weight"),
           py::arg("addend"), py::arg("raw"), py::arg("norm"), py::arg("x"), py::arg("sums"),
           py::arg("addend_step"), py::arg("x_size"), py::arg("weight_size"), py::arg("dz_stride"),
           py::arg("y_stride"), py::arg("weight_stride"), py::arg("addend_stride"),
           py::arg("raw_stride"), py::arg("x_stride"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"));
  define(module, kConvBnDgrad);
  module.def(
      "conv_bn_dgrad_cut_bytes",
      [](const RfConvBnDgrad& problem, const Gpu& gpu, int32_t index, int32_t splits,
         int64_t images) { return cut(problem, gpu, index, splits, images).workspace_bytes; },
      "Bytes of the workspace of conv_bn_dgrad_cut.");
  module.def(
      "conv_bn_dgrad_cut",
      [](const Settings& settings, const RfConvBnDgrad& problem, const Gpu& gpu, int32_t index,
         int32_t splits, int64_t images, uintptr_t workspace) {
        const RfConvPlan plan = cut(problem, gpu, index, splits, images);
        return run(settings, [&] {
          return rf_conv_bn_dgrad_cuda(&problem, &plan, pointer<void>(workspace), nullptr);
        });
      },
      "conv_bn_dgrad in launches of so many images.");
}

}  // namespace resnet_fused::emulated
