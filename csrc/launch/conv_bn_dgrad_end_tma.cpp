// What keeps conv_bn_dgrad_end from TMA, and its launch there.
#include "conv_bn_dgrad_end_tma.h"

#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_end_arguments.h"
#include "conv_bn_dgrad_end_tma_tiles.h"
#include "conv_strides.h"

namespace resnet_fused {

std::string bn_dgrad_end_tma_fault(const RfConvBnDgradEnd& problem, const TmaTileFacts& tile,
                                   int64_t images) {
  const RfConvGradient& conv = problem.image.conv;
  std::string found = bn_dgrad_tma_fault(problem.image, tile, images, "dx");
  if (!found.empty()) return found;
  found = dgrad_tma_output_fault("out", conv, tile, {problem.out, problem.out_stride}, images);
  if (!found.empty() || problem.projected == 0) return found;
  return dgrad_tma_output_fault("residual", conv, tile, {problem.residual, problem.residual_stride},
                                images);
}

int run_conv_bn_dgrad_end_tma(const RfConvBnDgradEnd& problem, const RfConvPlan& plan,
                              void* workspace, int64_t first, int64_t images, void* stream) {
  const int index = plan.configuration - kFirstBnDgradEndTma;
  const TmaTileFacts tile = dgrad_tma_tile<BnDgradEndTmaTiles>(index);
  const BnDgradLayout layout =
      bn_dgrad_end_layout(problem, *rf_conv_bn_dgrad_end_configuration(plan.configuration),
                          plan.splits, plan.images_a_launch);
  ConvBnDgradEndTmaArguments arguments{};
  ConvBnDgradTmaArguments& image = arguments.image;
  int error =
      bn_dgrad_tma_arguments(problem.image, tile, layout, plan, workspace, first, images, &image);
  const RfConvGradient& conv = problem.image.conv;
  const std::vector<DgradPhaseFacts> phases = phases_of(conv);
  for (int i = 0; i < image.dgrad.count && error == 0; ++i) {
    error = encode_dgrad_output(conv, phases[i], tile, {problem.out, problem.out_stride}, first,
                                images, &arguments.out[i]);
    if (error != 0 || problem.projected == 0) continue;
    error = encode_dgrad_output(conv, phases[i], tile, {problem.residual, problem.residual_stride},
                                first, images, &arguments.residual[i]);
  }
  if (error != 0) return error;
  if (problem.projected != 0) {
    arguments.projected = true;
    arguments.residual_mean = static_cast<const float*>(problem.residual_norm) + 2 * conv.x_size[1];
    arguments.third = third_sums(layout, workspace);
  }
  const ClearedCounters counters{workspace, first == 0 ? layout.counted : 0};
  const int32_t blocks = dgrad_tma_grid(image.dgrad, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  const auto launch =
      half ? launch_conv_bn_dgrad_end_tma_float16 : launch_conv_bn_dgrad_end_tma_bfloat16;
  return launch(arguments, counters, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), static_cast<void>(counters),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
