#include "conv_bn_grad1x1_end_launch.cuh"

int resnet_fused::launch_conv_bn_grad1x1_end_float16(const Grad1x1EndArguments& arguments,
                                                     int index, void* stream) {
  return launch_conv_bn_grad1x1_end<Float16>(arguments, index, stream);
}
