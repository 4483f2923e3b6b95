#include "stem_launch.cuh"

int resnet_fused::launch_stem_float16(const StemArguments& arguments, int configuration,
                                      int32_t blocks, void* stream) {
  return launch_stem<Float16>(arguments, configuration, blocks, stream);
}
