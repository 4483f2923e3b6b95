#include "../launch/conv_bn_wgrad.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnWgrad problem(const std::string& dtype, const std::string& weight_dtype, bool allow_tf32,
                      uintptr_t dz, uintptr_t y, uintptr_t coefficients, uintptr_t x,
                      uintptr_t norm, uintptr_t weight, const Sizes& x_size,
                      const Sizes& weight_size, const Sizes& dz_stride, const Sizes& y_stride,
                      const Sizes& x_stride, const Sizes& weight_stride, const Pair& stride,
                      const Pair& padding, const Pair& dilation, int32_t groups) {
  RfConvBnWgrad made{};
  made.product.dy = pointer<const void>(dz);
  made.product.y = pointer<const void>(y);
  made.product.x = pointer<void>(x);
  made.product.weight = pointer<void>(weight);
  made.coefficients = pointer<const void>(coefficients);
  made.norm = pointer<const void>(norm);
  made.affine = y != 0;
  made.normed = norm != 0;
  made.weight_dtype = static_cast<int32_t>(data_type(weight_dtype));
  fill(made.product.dy_stride, dz_stride);
  fill(made.product.y_stride, y_stride);
  fill(made.product.x_stride, x_stride);
  fill(made.product.weight_stride, weight_stride);
  fill_geometry(made.product, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation,
                groups);
  return made;
}

}  // namespace

void define_conv_bn_wgrad(py::module_& module) {
  py::class_<RfConvBnWgrad>(module, "ConvBnWgrad")
      .def(py::init(&problem), py::kw_only(), py::arg("dtype"), py::arg("weight_dtype"),
           py::arg("allow_tf32"), py::arg("dz"), py::arg("y"), py::arg("coefficients"),
           py::arg("x"), py::arg("norm"), py::arg("weight"), py::arg("x_size"),
           py::arg("weight_size"), py::arg("dz_stride"), py::arg("y_stride"), py::arg("x_stride"),
           py::arg("weight_stride"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
           py::arg("groups"));
  define(module, Convolution<RfConvBnWgrad>{
                     "conv_bn_wgrad", "The gradient; see csrc/launch/conv_bn_wgrad.h.",
                     rf_conv_bn_wgrad_configurations, rf_conv_bn_wgrad_configuration,
                     rf_conv_bn_wgrad_plan, rf_conv_bn_wgrad_cuda});
}

}  // namespace resnet_fused::emulated
