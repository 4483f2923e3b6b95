#include "conv_bn_grad1x1_end_tma_launch.cuh"

int resnet_fused::launch_conv_bn_grad1x1_end_tma_float16(const Grad1x1EndTmaArguments& arguments,
                                                         int index, void* stream) {
  return launch_conv_bn_grad1x1_end_tma<Float16>(arguments, index, stream);
}
