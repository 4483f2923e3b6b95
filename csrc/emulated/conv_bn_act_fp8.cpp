#include "../launch/conv_bn_act_fp8.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

int32_t type_of(const std::string& name) {
  return name == "float8_e4m3fn" ? kFloat8E4M3 : static_cast<int32_t>(data_type(name));
}

RfConvBnActFp8 problem(const RfConvBnAct& conv, const std::string& residual_dtype,
                       const std::string& out_dtype, float residual_factor, float out_factor) {
  RfConvBnActFp8 made{conv, type_of(residual_dtype), type_of(out_dtype), residual_factor,
                      out_factor};
  made.conv.dtype = kFloat8E4M3;
  return made;
}

}  // namespace

void define_conv_bn_act_fp8(py::module_& module) {
  py::class_<RfConvBnActFp8>(module, "ConvBnActFp8",
                             "A ConvBnAct, whatever its dtype, of tensors in e4m3.")
      .def(py::init(&problem), py::kw_only(), py::arg("conv"), py::arg("residual_dtype"),
           py::arg("out_dtype"), py::arg("residual_factor"), py::arg("out_factor"));
  define(module,
         Convolution<RfConvBnActFp8>{
             "conv_bn_act_fp8", "conv_bn_act on e4m3 operands; see csrc/launch/conv_bn_act_fp8.h.",
             rf_conv_bn_act_fp8_configurations, rf_conv_bn_act_fp8_configuration,
             rf_conv_bn_act_fp8_plan, rf_conv_bn_act_fp8_cuda});
}

}  // namespace resnet_fused::emulated
