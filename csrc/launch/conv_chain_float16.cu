#include "conv_chain_launch.cuh"

int resnet_fused::launch_conv_chain_float16(const ConvChainArguments& arguments, int configuration,
                                            void* stream) {
  return launch_conv_chain<Float16>(arguments, configuration, stream);
}
