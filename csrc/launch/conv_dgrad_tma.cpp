// The launch of conv_dgrad for sm_90a.
#include "conv_dgrad_tma.h"

#include "../device/bn_act.h"
#include "conv_dgrad_tma_tiles.h"

namespace resnet_fused {

int run_conv_dgrad_tma(const RfConvGradient& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream) {
  const int index = plan.configuration - kFirstDgradTma;
  const TmaTileFacts tile = dgrad_tma_tile<DgradTmaTiles>(index);
  ConvDgradTmaArguments arguments{};
  const int error = dgrad_tma_arguments(problem, tile, problem.y != nullptr, first, images,
                                        plan.blocks, &arguments);
  if (error != 0) return error;
  const int32_t blocks = dgrad_tma_grid(arguments, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_dgrad_tma_float16 : launch_conv_dgrad_tma_bfloat16;
  return launch(arguments, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
