#include "../launch/conv_chain_fp8.h"

#include "chain_layer.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvChainFp8> kOp = {"conv_chain_fp8", rf_conv_chain_fp8_configurations,
                                           rf_conv_chain_fp8_configuration, rf_conv_chain_fp8_plan,
                                           rf_conv_chain_fp8_cuda};

// Powers of two: on integers most results are rounded, and some saturate.
constexpr ChainFactors kFactors{0.5, 2, 0.5, 0x1p-5};

}  // namespace

bool run_conv_chain_fp8(const Arguments& arguments, Common& common, Json& json) {
  if (!arguments.flag("quantised")) {
    throw UsageError("conv_chain_fp8 writes nothing but e4m3; give --quantised");
  }
  const ChainSizes of(arguments);
  ChainLayer<Float8> layer(of, common, kFactors);
  RfConvChainFp8 problem{layer.problem(arguments), static_cast<float>(kFactors.residual),
                         static_cast<float>(kFactors.projection), static_cast<float>(kFactors.out),
                         static_cast<float>(kFactors.next)};
  problem.chain.dtype = kFloat8E4M3;
  return layer.run(kOp, problem, arguments, json);
}

}  // namespace resnet_fused::driver
