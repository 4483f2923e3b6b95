#include "conv_layer.h"

namespace resnet_fused::driver {
namespace {

constexpr Interface<RfConvBnAct> kOp = {"conv_bn_act", rf_conv_bn_act_configurations,
                                        rf_conv_bn_act_configuration, rf_conv_bn_act_plan,
                                        rf_conv_bn_act_cuda};

}  // namespace

bool run_conv_bn_act(const Arguments& arguments, Common& common, Json& json) {
  const Convolution of(arguments);
  return with_conv_type(kOp.name, common.dtype, [&]<class T>() {
    ConvLayer<T, T> layer(of, arguments, common);
    return layer.run(kOp, layer.problem(), arguments, json);
  });
}

}  // namespace resnet_fused::driver
