#include "conv_chain_window_launch.cuh"

int resnet_fused::launch_conv_chain_window_float16(const ChainWindowArguments& arguments, int index,
                                                   int32_t blocks, int32_t shared_bytes,
                                                   void* stream) {
  return launch_conv_chain_window<Float16>(arguments, index, blocks, shared_bytes, stream);
}
