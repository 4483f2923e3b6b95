#include "conv_bn_act_cluster_launch.cuh"

int resnet_fused::launch_conv_bn_act_cluster_float16(const ConvClusterArguments& arguments,
                                                     int index, int32_t blocks, void* stream) {
  return launch_conv_bn_act_cluster<Float16>(arguments, index, blocks, stream);
}
