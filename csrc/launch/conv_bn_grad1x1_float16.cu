#include "conv_bn_grad1x1_launch.cuh"

int resnet_fused::launch_conv_bn_grad1x1_float16(const Grad1x1Arguments& arguments,
                                                 int configuration, void* stream) {
  return launch_conv_bn_grad1x1<Float16>(arguments, configuration, stream);
}
