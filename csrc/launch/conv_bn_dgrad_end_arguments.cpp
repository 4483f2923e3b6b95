// What conv_bn_dgrad_end is told beside conv_bn_dgrad's, and its launch.
#include "conv_bn_dgrad_end_arguments.h"

#include "conv_bn_dgrad_end_tma.h"
#include "conv_strides.h"

namespace resnet_fused {

BnDgradLayout bn_dgrad_end_layout(const RfConvBnDgradEnd& problem, const RfConvConfiguration& tile,
                                  int32_t splits, int64_t images_a_launch) {
  return bn_dgrad_layout(problem.image, tile, splits, images_a_launch,
                         problem.projected != 0 ? kProjectedSumRows : kSumRows);
}

ConvBnDgradEndArguments conv_bn_dgrad_end_arguments(const RfConvBnDgradEnd& problem,
                                                    const RfConvPlan& plan,
                                                    const RfConvConfiguration& tile,
                                                    void* workspace, int64_t first,
                                                    int64_t images) {
  const RfConvGradient& conv = problem.image.conv;
  const int64_t bytes = bytes_of(conv.dtype);
  const int64_t channels = conv.weight_size[1];
  const BnDgradLayout layout =
      bn_dgrad_end_layout(problem, tile, plan.splits, plan.images_a_launch);

  ConvBnDgradEndArguments arguments{};
  static_cast<ConvBnDgradArguments&>(arguments) =
      conv_bn_dgrad_arguments(problem.image, plan, tile, layout, workspace, first, images);
  bool& wide = arguments.conv.wide_dx;
  const Strides out = used(conv.x_size, problem.out_stride);
  arguments.out = moved(problem.out, first * out.n * bytes);
  arguments.out_strides = out.of_pixels();
  wide = wide && is_wide(problem.out, out, channels, bytes);
  if (problem.projected == 0) return arguments;
  const Strides residual = used(conv.x_size, problem.residual_stride);
  arguments.residual = moved(problem.residual, first * residual.n * bytes);
  arguments.residual_strides = residual.of_pixels();
  arguments.residual_mean = static_cast<const float*>(problem.residual_norm) + 2 * conv.x_size[1];
  wide = wide && is_wide(problem.residual, residual, channels, bytes) &&
         is_aligned(problem.residual_norm);
  arguments.third = third_sums(layout, workspace);
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_conv_bn_dgrad_end_cuda(const RfConvBnDgradEnd* problem, const RfConvPlan* plan,
                                         void* workspace, void* stream) {
  using namespace resnet_fused;
  constexpr Launches<ConvBnDgradEndArguments> kLaunches{launch_conv_bn_dgrad_end_bfloat16,
                                                        launch_conv_bn_dgrad_end_float16,
                                                        launch_conv_bn_dgrad_end_float32};
  const RfConvGradient& conv = problem->image.conv;
  const RfConvConfiguration& tile = *rf_conv_bn_dgrad_end_configuration(plan->configuration);
  return launch_parts(*plan, conv.x_size[0], [&](int64_t first, int64_t count) {
    if (tile.tma != 0) {
      return run_conv_bn_dgrad_end_tma(*problem, *plan, workspace, first, count, stream);
    }
    return kLaunches(conv.dtype,
                     conv_bn_dgrad_end_arguments(*problem, *plan, tile, workspace, first, count),
                     plan->configuration, stream);
  });
}
