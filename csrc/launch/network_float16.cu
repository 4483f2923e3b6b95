#include "network_launch.cuh"

int resnet_fused::launch_network_float16(const NetworkArguments& arguments, int32_t blocks,
                                         void* stream) {
  return launch_network<Float16>(arguments, blocks, stream);
}
