#include "../launch/conv_gradients.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

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
  fill(made.dy_stride, dy_stride);
  fill(made.y_stride, y_stride);
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  fill_geometry(made, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation, groups);
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
  const char* help = "The gradient; see csrc/launch/conv_gradients.h.";
  define(module, Convolution<RfConvGradient>{"conv_dgrad", help, rf_conv_dgrad_configurations,
                                             rf_conv_dgrad_configuration, rf_conv_dgrad_plan,
                                             rf_conv_dgrad_cuda});
  define(module, Convolution<RfConvGradient>{"conv_wgrad", help, rf_conv_wgrad_configurations,
                                             rf_conv_wgrad_configuration, rf_conv_wgrad_plan,
                                             rf_conv_wgrad_cuda});
}

}  // namespace resnet_fused::emulated
