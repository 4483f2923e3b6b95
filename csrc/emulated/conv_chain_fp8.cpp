#include "../launch/conv_chain_fp8.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

RfConvChainFp8 problem(const RfConvChain& chain, float residual_factor, float projection_factor,
                       float out_factor, float next_factor) {
  RfConvChainFp8 made{chain, residual_factor, projection_factor, out_factor, next_factor};
  made.chain.dtype = kFloat8E4M3;
  return made;
}

}  // namespace

void define_conv_chain_fp8(py::module_& module) {
  py::class_<RfConvChainFp8>(module, "ConvChainFp8",
                             "A ConvChain, whatever its dtype, of tensors in e4m3.")
      .def(py::init(&problem), py::kw_only(), py::arg("chain"), py::arg("residual_factor"),
           py::arg("projection_factor"), py::arg("out_factor"), py::arg("next_factor"));
  define(module,
         Convolution<RfConvChainFp8>{
             "conv_chain_fp8", "conv_chain on e4m3 operands; see csrc/launch/conv_chain_fp8.h.",
             rf_conv_chain_fp8_configurations, rf_conv_chain_fp8_configuration,
             rf_conv_chain_fp8_plan, rf_conv_chain_fp8_cuda});
}

}  // namespace resnet_fused::emulated
