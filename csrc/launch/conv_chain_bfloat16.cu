#include "conv_chain_launch.cuh"

int resnet_fused::launch_conv_chain_bfloat16(const ConvChainArguments& arguments, int configuration,
                                             void* stream) {
  return launch_conv_chain<BFloat16>(arguments, configuration, stream);
}
