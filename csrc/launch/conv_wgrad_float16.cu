#include "conv_wgrad_launch.cuh"

int resnet_fused::launch_conv_wgrad_float16(const ConvWgradArguments& arguments, int configuration,
                                            void* stream) {
  return launch_conv_wgrad<Float16>(arguments, configuration, stream);
}
