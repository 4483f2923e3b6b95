#include "conv_dgrad_launch.cuh"

int resnet_fused::launch_conv_dgrad_float32(const ConvDgradArguments& arguments, int configuration,
                                            void* stream) {
  return launch_conv_dgrad<float>(arguments, configuration, stream);
}
