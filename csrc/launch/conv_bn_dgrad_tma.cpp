// What keeps conv_bn_dgrad from TMA, and its launch there.
#include "conv_bn_dgrad_tma.h"

#include "../device/bn_act.h"
#include "conv_bn_dgrad_arguments.h"
#include "conv_bn_dgrad_tma_tiles.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {

namespace {

// Whether threads bring the addend: of a stride of 1 no map leaves out pixels.
bool gathers(const RfConvBnDgrad& problem) {
  const int64_t (&stride)[2] = problem.conv.stride;
  return problem.added != 0 && problem.addend_step != 1 && stride[0] == 1 && stride[1] == 1;
}

Strides addend_strides(const RfConvBnDgrad& problem) {
  const int64_t (&x)[4] = problem.conv.x_size, step = problem.addend_step;
  const int64_t size[4] = {x[0], x[1], divide_up(x[2], step), divide_up(x[3], step)};
  return used(size, problem.addend_stride);
}

// What keeps an addend of its own step from a tile.
std::string addend_fault(const RfConvBnDgrad& problem, const TmaTileFacts& tile, int64_t images) {
  const RfConvGradient& conv = problem.conv;
  const int64_t step = problem.addend_step;
  if (gathers(problem)) {
    const bool wide =
        is_wide(problem.addend, addend_strides(problem), conv.weight_size[1], bytes_of(conv.dtype));
    return wide ? "" : "addend: its channels do not lie in whole chunks of 16 bytes";
  }
  if (step != 1 && (step != conv.stride[0] || step != conv.stride[1])) {
    return "addend: every " + std::to_string(step) +
           "-th pixel; every one is accepted, those of the stride, or any by a stride of 1";
  }
  return dgrad_tma_output_fault("addend", conv, tile, {problem.addend, problem.addend_stride},
                                images, step);
}

}  // namespace

std::string bn_dgrad_tma_fault(const RfConvBnDgrad& problem, const TmaTileFacts& tile,
                               int64_t images, const char* result) {
  const DgradNames names{"dz", "coefficients", result};
  const RfConvGradient& conv = problem.conv;
  std::string found = dgrad_tma_fault(conv, tile, names, problem.affine != 0, images);
  if (!found.empty()) return found;
  if (problem.added != 0) {
    found = addend_fault(problem, tile, images);
    if (!found.empty()) return found;
  }
  if (problem.reduced == 0) return "";
  return dgrad_tma_output_fault("raw", conv, tile, {problem.raw, problem.raw_stride}, images);
}

int bn_dgrad_tma_arguments(const RfConvBnDgrad& problem, const TmaTileFacts& tile,
                           const BnDgradLayout& layout, const RfConvPlan& plan, void* workspace,
                           int64_t first, int64_t images, ConvBnDgradTmaArguments* made) {
  const RfConvGradient& conv = problem.conv;
  ConvBnDgradTmaArguments& arguments = *made;
  int error = dgrad_tma_arguments(conv, tile, problem.affine != 0, first, images, plan.blocks,
                                  &arguments.dgrad);
  const std::vector<DgradPhaseFacts> phases = phases_of(conv);
  const int64_t step = gathers(problem) ? 1 : problem.addend_step;
  if (gathers(problem)) {
    const Strides addend = addend_strides(problem);
    arguments.gathered = {moved(problem.addend, first * addend.n * bytes_of(conv.dtype)),
                          addend.of_pixels(), make_divisor(narrowed(problem.addend_step))};
  }
  for (int i = 0; i < arguments.dgrad.count && error == 0; ++i) {
    const DgradPhaseFacts& phase = phases[i];
    ConvTmaArguments& told = arguments.dgrad.phases[i].conv;
    // Of every other pixel one phase has all.
    told.has_residual =
        problem.added != 0 && phase.h.index % step == 0 && phase.w.index % step == 0;
    if (told.has_residual && !gathers(problem)) {
      error = encode_dgrad_output(conv, phase, tile, {problem.addend, problem.addend_stride}, first,
                                  images, &told.residual, step);
    }
    if (error == 0 && problem.reduced != 0) {
      error = encode_dgrad_output(conv, phase, tile, {problem.raw, problem.raw_stride}, first,
                                  images, &arguments.raw[i]);
    }
  }
  if (error != 0) return error;
  arguments.norm = static_cast<const float*>(problem.norm);
  arguments.reduced = problem.reduced != 0;
  arguments.filters = narrowed(conv.weight_size[0]);
  const OutputSize size = output_size(conv);
  arguments.height = static_cast<uint32_t>(size.p);
  arguments.width = static_cast<uint32_t>(size.q);
  const PhaseSize phase = phase_size(conv);
  arguments.tiles_that_meet = narrowed(divide_up(images * phase.rows * phase.columns, tile.pixels));
  arguments.reduction = gradient_reduction(problem, layout, plan, workspace, first);
  return 0;
}

int run_conv_bn_dgrad_tma(const RfConvBnDgrad& problem, const RfConvPlan& plan, void* workspace,
                          int64_t first, int64_t images, void* stream) {
  const int index = plan.configuration - kFirstBnDgradTma;
  const TmaTileFacts tile = dgrad_tma_tile<BnDgradTmaTiles>(index);
  const BnDgradLayout layout =
      bn_dgrad_layout(problem, *rf_conv_bn_dgrad_configuration(plan.configuration), plan.splits,
                      plan.images_a_launch);
  ConvBnDgradTmaArguments arguments{};
  const int error =
      bn_dgrad_tma_arguments(problem, tile, layout, plan, workspace, first, images, &arguments);
  if (error != 0) return error;
  const ClearedCounters counters{workspace, first == 0 ? layout.counted : 0};
  const int32_t blocks = dgrad_tma_grid(arguments.dgrad, tile, plan);
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.conv.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_bn_dgrad_tma_float16 : launch_conv_bn_dgrad_tma_bfloat16;
  return launch(arguments, counters, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), static_cast<void>(counters),
         kNoKernelImage;
#endif
}

}  // namespace resnet_fused
