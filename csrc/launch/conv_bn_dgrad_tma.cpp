// What keeps conv_bn_dgrad from TMA, and its launch there.
#include "conv_bn_dgrad_tma.h"

#include "../device/bn_act.h"
#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_tma_tiles.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {

std::string bn_dgrad_tma_fault(const RfConvBnDgrad& problem, const TmaTileFacts& tile,
                               int64_t images) {
  constexpr DgradNames kNames{"dz", "coefficients"};
  const RfConvGradient& conv = problem.conv;
  std::string found = dgrad_tma_fault(conv, tile, kNames, problem.affine != 0, images);
  if (!found.empty()) return found;
  const RfConvBnAct made = convolution_of(conv);
  const TensorElement element = element_of(conv.dtype);
  if (problem.added != 0) {
    if (problem.addend_step != 1) {
      return "addend: every " + std::to_string(problem.addend_step) +
             "-th pixel; every one is accepted";
    }
    found = tma_output_fault("addend", made, element, tile, problem.addend, problem.addend_stride,
                             images);
    if (!found.empty()) return found;
  }
  if (problem.reduced == 0) return "";
  return tma_output_fault("raw", made, element, tile, problem.raw, problem.raw_stride, images);
}

int run_conv_bn_dgrad_tma(const RfConvBnDgrad& problem, const RfConvPlan& plan, void* workspace,
                          int64_t first, int64_t images, void* stream) {
  const int index = plan.configuration - kFirstBnDgradTma;
  const TmaTileFacts tile = dgrad_tma_tile<BnDgradTmaTiles>(index);
  const RfConvGradient& conv = problem.conv;
  const RfConvBnAct made = convolution_of(conv);
  const TensorElement element = element_of(conv.dtype);
  const BnDgradLayout layout =
      bn_dgrad_layout(problem, *rf_conv_bn_dgrad_configuration(plan.configuration), plan.splits,
                      plan.images_a_launch);
  ConvBnDgradTmaArguments arguments{};
  int error = dgrad_tma_arguments(conv, tile, problem.affine != 0, first, images, &arguments.dgrad);
  arguments.dgrad.conv.has_residual = problem.added != 0;
  if (error == 0 && problem.added != 0) {
    error = encode_tma_output(made, element, tile, problem.addend, problem.addend_stride, first,
                              images, &arguments.dgrad.conv.residual);
  }
  if (error == 0 && problem.reduced != 0) {
    error = encode_tma_output(made, element, tile, problem.raw, problem.raw_stride, first, images,
                              &arguments.raw);
  }
  if (error != 0) return error;
  arguments.norm = static_cast<const float*>(problem.norm);
  arguments.reduced = problem.reduced != 0;
  arguments.filters = narrowed(conv.weight_size[0]);
  arguments.height = static_cast<uint32_t>(made.x_size[2]);
  arguments.width = static_cast<uint32_t>(made.x_size[3]);
  arguments.reduction = gradient_reduction(problem, layout, plan, workspace, first);
  const ClearedCounters counters{workspace, first == 0 ? layout.counted : 0};
  const int32_t blocks = tma_blocks(arguments.dgrad.conv, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(conv.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_dgrad_tma_float16 : launch_conv_bn_dgrad_tma_bfloat16;
  return launch(arguments, counters, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), static_cast<void>(counters),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
