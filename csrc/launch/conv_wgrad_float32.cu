#include "conv_wgrad_launch.cuh"

int resnet_fused::launch_conv_wgrad_float32(const ConvWgradArguments& arguments, int configuration,
                                            void* stream) {
  return launch_conv_wgrad<float>(arguments, configuration, stream);
}
