#include "chain_layer.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvChain> kOp = {"conv_chain", rf_conv_chain_configurations,
                                        rf_conv_chain_configuration, rf_conv_chain_plan,
                                        rf_conv_chain_cuda};

}  // namespace

bool run_conv_chain(const Arguments& arguments, Common& common, Json& json) {
  const ChainSizes of(arguments);
  return with_conv_type(kOp.name, common.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4) {
      throw UsageError("--dtype is 'float32'; conv_chain serves float16 and bfloat16");
      return false;
    } else {
      ChainLayer<T> layer(of, common);
      RfConvChain problem = layer.problem(arguments);
      problem.dtype = static_cast<int32_t>(common.dtype);
      return layer.run(kOp, problem, arguments, json);
    }
  });
}

}  // namespace resnet_fused::driver
