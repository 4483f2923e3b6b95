#include "conv_bn_wgrad_launch.cuh"

int resnet_fused::launch_conv_bn_wgrad_bfloat16(const ConvBnWgradArguments& arguments,
                                                int configuration, void* stream) {
  return launch_conv_bn_wgrad<BFloat16>(arguments, configuration, stream);
}
