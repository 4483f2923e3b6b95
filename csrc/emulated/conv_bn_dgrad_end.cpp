#include "../launch/conv_bn_dgrad_end.h"

#include "../launch/conv_bn_dgrad_end_arguments.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnDgradEnd problem(const std::string& dtype, bool allow_tf32, uintptr_t dz, uintptr_t y,
                         uintptr_t coefficients, uintptr_t weight, uintptr_t addend, uintptr_t out,
                         uintptr_t raw, uintptr_t norm, uintptr_t residual, uintptr_t residual_norm,
                         uintptr_t x, uintptr_t sums, int64_t addend_step, const Sizes& x_size,
                         const Sizes& weight_size, const Sizes& dz_stride, const Sizes& y_stride,
                         const Sizes& weight_stride, const Sizes& addend_stride,
                         const Sizes& out_stride, const Sizes& raw_stride,
                         const Sizes& residual_stride, const Sizes& x_stride, const Pair& stride,
                         const Pair& padding, const Pair& dilation, int32_t groups) {
  RfConvBnDgradEnd made{};
  RfConvBnDgrad& image = made.image;
  image.conv.dy = pointer<const void>(dz);
  image.conv.y = pointer<const void>(y);
  image.conv.scale = pointer<const void>(coefficients);
  image.conv.weight = pointer<void>(weight);
  image.conv.x = pointer<void>(x);
  image.addend = pointer<const void>(addend);
  image.raw = pointer<const void>(raw);
  image.norm = pointer<const void>(norm);
  image.sums = pointer<void>(sums);
  image.affine = y != 0;
  image.added = addend != 0;
  image.reduced = 1;
  image.addend_step = addend_step;
  fill(image.conv.dy_stride, dz_stride);
  fill(image.conv.y_stride, y_stride);
  fill(image.conv.x_stride, x_stride);
  fill(image.conv.weight_stride, weight_stride);
  fill(image.addend_stride, addend_stride);
  fill(image.raw_stride, raw_stride);
  fill_geometry(image.conv, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation,
                groups);
  made.out = pointer<const void>(out);
  made.residual = pointer<const void>(residual);
  made.residual_norm = pointer<const void>(residual_norm);
  made.projected = residual != 0;
  fill(made.out_stride, out_stride);
  fill(made.residual_stride, residual_stride);
  return made;
}

const Convolution<RfConvBnDgradEnd> kConvBnDgradEnd{
    "conv_bn_dgrad_end",
    "The gradient behind the ReLU of a block's end, and its reductions; see "
    "csrc/launch/conv_bn_dgrad_end.h.",
    rf_conv_bn_dgrad_end_configurations,
    rf_conv_bn_dgrad_end_configuration,
    rf_conv_bn_dgrad_end_plan,
    rf_conv_bn_dgrad_end_cuda};

// As conv_bn_dgrad's.
RfConvPlan cut(const RfConvBnDgradEnd& problem, const Gpu& gpu, int32_t index, int32_t splits,
               int64_t images) {
  RfConvPlan plan = kConvBnDgradEnd.planned(problem, gpu, index, splits);
  plan.images_a_launch = images;
  plan.launches = (problem.image.conv.x_size[0] + images - 1) / images;
  const RfConvConfiguration& tile = *rf_conv_bn_dgrad_end_configuration(plan.configuration);
  plan.workspace_bytes = bn_dgrad_end_layout(problem, tile, plan.splits, images).bytes;
  return plan;
}

}  // namespace

void define_conv_bn_dgrad_end(py::module_& module) {
  py::class_<RfConvBnDgradEnd>(module, "ConvBnDgradEnd")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("allow_tf32"),
           py::arg("dz"), py::arg("y"), py::arg("coefficients"), py::arg("weight"),
           py::arg("addend"), py::arg("out"), py::arg("raw"), py::arg("norm"), py::arg("residual"),
           py::arg("residual_norm"), py::arg("x"), py::arg("sums"), py::arg("addend_step"),
           py::arg("x_size"), py::arg("weight_size"), py::arg("dz_stride"), py::arg("y_stride"),
           py::arg("weight_stride"), py::arg("addend_stride"), py::arg("out_stride"),
           py::arg("raw_stride"), py::arg("residual_stride"), py::arg("x_stride"),
           py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"));
  define(module, kConvBnDgradEnd);
  module.def(
      "conv_bn_dgrad_end_cut_bytes",
      [](const RfConvBnDgradEnd& problem, const Gpu& gpu, int32_t index, int32_t splits,
         int64_t images) { return cut(problem, gpu, index, splits, images).workspace_bytes; },
      "Bytes of the workspace of conv_bn_dgrad_end_cut.");
  module.def(
      "conv_bn_dgrad_end_cut",
      [](const Settings& settings, const RfConvBnDgradEnd& problem, const Gpu& gpu, int32_t index,
         int32_t splits, int64_t images, uintptr_t workspace) {
        const RfConvPlan plan = cut(problem, gpu, index, splits, images);
        return run(settings, [&] {
          return rf_conv_bn_dgrad_end_cuda(&problem, &plan, pointer<void>(workspace), nullptr);
        });
      },
      "conv_bn_dgrad_end in launches of so many images.");
}

}  // namespace resnet_fused::emulated
