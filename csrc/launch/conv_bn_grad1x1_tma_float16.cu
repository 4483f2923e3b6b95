#include "conv_bn_grad1x1_tma_launch.cuh"

int resnet_fused::launch_conv_bn_grad1x1_tma_float16(const Grad1x1TmaArguments& arguments,
                                                     int index, void* stream) {
  return launch_conv_bn_grad1x1_tma<Float16>(arguments, index, stream);
}
