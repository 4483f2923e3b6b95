#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvBnAct problem(const std::string& dtype, bool relu, bool allow_tf32, uintptr_t x,
                    uintptr_t weight, uintptr_t residual, uintptr_t scale, uintptr_t shift,
                    uintptr_t out, const Sizes& x_size, const Sizes& weight_size,
                    const Sizes& x_stride, const Sizes& weight_stride, const Sizes& residual_stride,
                    const Sizes& out_stride, const Pair& stride, const Pair& padding,
                    const Pair& dilation, int32_t groups, bool reverse, bool dependent,
                    bool follows, uintptr_t arrivals, int64_t arrivals_count) {
  RfConvBnAct made{};
  made.x = pointer<const void>(x);
  made.weight = pointer<const void>(weight);
  made.residual = pointer<const void>(residual);
  made.scale = pointer<const void>(scale);
  made.shift = pointer<const void>(shift);
  made.out = pointer<void>(out);
  made.relu = relu;
  made.reverse = reverse;
  made.flow = {dependent, follows};
  made.arrivals = pointer<uint32_t>(arrivals);
  made.arrivals_count = arrivals_count;
  fill(made.x_stride, x_stride);
  fill(made.weight_stride, weight_stride);
  fill(made.residual_stride, residual_stride);
  fill(made.out_stride, out_stride);
  fill_geometry(made, dtype, allow_tf32, x_size, weight_size, stride, padding, dilation, groups);
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
           py::arg("dilation"), py::arg("groups"), py::arg("reverse"), py::arg("dependent"),
           py::arg("follows"), py::arg("arrivals"), py::arg("arrivals_count"));
  define(module,
         Convolution<RfConvBnAct>{"conv_bn_act",
                                  "y = act(scale conv(x, weight) + shift [+ residual]); see "
                                  "csrc/launch/conv_bn_act.h.",
                                  rf_conv_bn_act_configurations, rf_conv_bn_act_configuration,
                                  rf_conv_bn_act_plan, rf_conv_bn_act_cuda});
}

}  // namespace resnet_fused::emulated
