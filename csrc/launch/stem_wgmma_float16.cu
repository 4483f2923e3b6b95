#include "stem_wgmma_launch.cuh"

int resnet_fused::launch_stem_wgmma_float16(const StemArguments& arguments, int index,
                                            int32_t blocks, void* stream) {
  return launch_stem_wgmma<Float16>(arguments, index, blocks, stream);
}
