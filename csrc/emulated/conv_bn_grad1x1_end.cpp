#include "conv_bn_grad1x1_end.h"

#include "../launch/conv_bn_grad1x1_end.h"
#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnGrad1x1End problem(const std::string& dtype, const std::string& dweight_dtype, uintptr_t dz,
                           uintptr_t y, uintptr_t coefficients, uintptr_t weight, uintptr_t addend,
                           uintptr_t out, uintptr_t raw, uintptr_t norm, uintptr_t residual,
                           uintptr_t residual_norm, uintptr_t dx, uintptr_t sums, uintptr_t dweight,
                           int64_t addend_step, const Sizes& x_size, const Sizes& weight_size,
                           const Sizes& dz_stride, const Sizes& y_stride,
                           const Sizes& weight_stride, const Sizes& addend_stride,
                           const Sizes& out_stride, const Sizes& raw_stride,
                           const Sizes& residual_stride, const Sizes& dx_stride,
                           const Sizes& dweight_stride, const Pair& stride, const Pair& padding,
                           const Pair& dilation, int32_t groups) {
  RfConvBnGrad1x1End made{};
  RfConvBnDgradEnd& end = made.end;
  RfConvBnDgrad& image = end.image;
  image.conv.dy = pointer<const void>(dz);
  image.conv.y = pointer<const void>(y);
  image.conv.scale = pointer<const void>(coefficients);
  image.conv.weight = pointer<void>(weight);
  image.conv.x = pointer<void>(dx);
  image.addend = pointer<const void>(addend);
  image.raw = pointer<const void>(raw);
  image.norm = pointer<const void>(norm);
  image.sums = pointer<void>(sums);
  image.affine = y != 0;
  image.added = addend != 0;
  image.reduced = 1;
  image.addend_step = addend_step;
  end.out = pointer<const void>(out);
  end.residual = pointer<const void>(residual);
  end.residual_norm = pointer<const void>(residual_norm);
  end.projected = residual != 0;
  made.dweight = pointer<void>(dweight);
  made.dweight_dtype = static_cast<int32_t>(data_type(dweight_dtype));
  fill(image.conv.dy_stride, dz_stride);
  fill(image.conv.y_stride, y_stride);
  fill(image.conv.x_stride, dx_stride);
  fill(image.conv.weight_stride, weight_stride);
  fill(image.addend_stride, addend_stride);
  fill(image.raw_stride, raw_stride);
  fill(end.out_stride, out_stride);
  fill(end.residual_stride, residual_stride);
  fill(made.dweight_stride, dweight_stride);
  fill_geometry(image.conv, dtype, true, x_size, weight_size, stride, padding, dilation, groups);
  return made;
}

}  // namespace

void define_conv_bn_grad1x1_end(py::module_& module) {
  py::class_<RfConvBnGrad1x1End>(module, "ConvBnGrad1x1End")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("dweight_dtype"),
           py::arg("dz"), py::arg("y"), py::arg("coefficients"), py::arg("weight"),
           py::arg("addend"), py::arg("out"), py::arg("raw"), py::arg("norm"), py::arg("residual"),
           py::arg("residual_norm"), py::arg("dx"), py::arg("sums"), py::arg("dweight"),
           py::arg("addend_step"), py::arg("x_size"), py::arg("weight_size"), py::arg("dz_stride"),
           py::arg("y_stride"), py::arg("weight_stride"), py::arg("addend_stride"),
           py::arg("out_stride"), py::arg("raw_stride"), py::arg("residual_stride"),
           py::arg("dx_stride"), py::arg("dweight_stride"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"));
  define(module, Convolution<RfConvBnGrad1x1End>{
                     "conv_bn_grad1x1_end",
                     "Both gradients, behind a block's end; see csrc/launch/conv_bn_grad1x1_end.h.",
                     rf_conv_bn_grad1x1_end_configurations, rf_conv_bn_grad1x1_end_configuration,
                     rf_conv_bn_grad1x1_end_plan, rf_conv_bn_grad1x1_end_cuda});
}

}  // namespace resnet_fused::emulated
