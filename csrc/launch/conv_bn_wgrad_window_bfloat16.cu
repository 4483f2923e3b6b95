#include "conv_bn_wgrad_window_launch.cuh"

int resnet_fused::launch_conv_bn_wgrad_window_bfloat16(const BnWgradWindowArguments& arguments,
                                                       int index, int32_t shared_bytes,
                                                       void* stream) {
  return launch_conv_bn_wgrad_window<BFloat16>(arguments, index, shared_bytes, stream);
}
