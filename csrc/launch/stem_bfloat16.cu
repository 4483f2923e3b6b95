#include "stem_launch.cuh"

int resnet_fused::launch_stem_bfloat16(const StemArguments& arguments, int configuration,
                                       int32_t blocks, void* stream) {
  return launch_stem<BFloat16>(arguments, configuration, blocks, stream);
}
