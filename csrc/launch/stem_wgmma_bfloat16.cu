#include "stem_wgmma_launch.cuh"

int resnet_fused::launch_stem_wgmma_bfloat16(const StemArguments& arguments, int index,
                                             int32_t blocks, void* stream) {
  return launch_stem_wgmma<BFloat16>(arguments, index, blocks, stream);
}
