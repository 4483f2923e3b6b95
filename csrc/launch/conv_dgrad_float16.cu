#include "conv_dgrad_launch.cuh"

int resnet_fused::launch_conv_dgrad_float16(const ConvDgradArguments& arguments, int configuration,
                                            void* stream) {
  return launch_conv_dgrad<Float16>(arguments, configuration, stream);
}
