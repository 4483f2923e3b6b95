// conv_bn_act for sm_90a on float32: its configurations, what they refuse, and its launch.
#include "conv_bn_act_tf32.h"

namespace resnet_fused {

TmaTileFacts tf32_tile(int index) {
  return ConvTf32Tiles::with(index, []<class Shape>() { return facts_of<Shape>(); });
}

std::string tf32_name(const TmaTileFacts& tile) {
  std::string name = tma_name(tile);
  return name.insert(name.find('_'), "_tf32");
}

RfConvConfiguration tf32_configuration(const TmaTileFacts& tile) {
  RfConvConfiguration made = tma_configuration(tile);
  made.float32 = 1;
  return made;
}

std::string tf32_fault(const RfConvBnAct& problem, const TmaTileFacts& tile, int64_t images) {
  if (static_cast<DataType>(problem.dtype) != DataType::kFloat32) {
    return "dtype: 16 bits; this configuration is for float32";
  }
  return tma_fault(problem, kTf32Types, tile, images);
}

int run_conv_bn_act_tf32(const RfConvBnAct& problem, const RfConvPlan& plan, int64_t first,
                         int64_t images, void* stream) {
  const int index = plan.configuration - kFirstTf32;
  ConvTmaArguments arguments;
  const TmaTileFacts tile = tf32_tile(index);
  const int error = tma_arguments(problem, kTf32Types, tile, first, images, &arguments);
  if (error != 0) return error;
  const int32_t blocks = tma_blocks(arguments, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  return launch_conv_bn_act_tf32(arguments, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
