#include "conv_bn_wgrad_tma_launch.cuh"

int resnet_fused::launch_conv_bn_wgrad_tma_float16(const ConvBnWgradTmaArguments& arguments,
                                                   int index, void* stream) {
  return launch_conv_bn_wgrad_tma<Float16>(arguments, index, stream);
}
