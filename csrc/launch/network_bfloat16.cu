#include "network_launch.cuh"

int resnet_fused::launch_network_bfloat16(const NetworkArguments& arguments, int32_t blocks,
                                          void* stream) {
  return launch_network<BFloat16>(arguments, blocks, stream);
}
