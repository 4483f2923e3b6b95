#include "../launch/conv_bn_act_fp8.h"

#include "conv_layer.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnActFp8> kOp = {"conv_bn_act_fp8", rf_conv_bn_act_fp8_configurations,
                                           rf_conv_bn_act_fp8_configuration,
                                           rf_conv_bn_act_fp8_plan, rf_conv_bn_act_fp8_cuda};

// A stored 1 of the residual is worth half, one of the result two: on integers most results are
// rounded, and some saturate.
constexpr Factors kFactors{0.5, 0.5};

template <class Out>
bool run(const Convolution& of, int32_t out_dtype, const Arguments& arguments, Common& common,
         Json& json) {
  ConvLayer<Float8, Out> layer(of, arguments, common, kFactors);
  RfConvBnActFp8 problem{layer.problem(), kFloat8E4M3, out_dtype,
                         static_cast<float>(kFactors.residual), static_cast<float>(kFactors.out)};
  problem.conv.dtype = kFloat8E4M3;
  return layer.run(kOp, problem, arguments, json);
}

}  // namespace

bool run_conv_bn_act_fp8(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  if (arguments.flag("quantised")) return run<Float8>(of, kFloat8E4M3, arguments, common, json);
  return with_conv_type(kOp.name, common.dtype, [&]<class T>() {
    return run<T>(of, static_cast<int32_t>(common.dtype), arguments, common, json);
  });
}

}  // namespace resnet_fused::driver
