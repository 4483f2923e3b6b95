// What conv_bn_wgrad's kernels are told beside conv_wgrad's operands, and their launch.
#include "conv_bn_wgrad_arguments.h"

#include "conv_strides.h"

namespace resnet_fused {

bool bn_wgrad_reads_wide(const RfConvBnWgrad& problem) {
  return wgrad_reads_wide(problem.product, problem.affine != 0) &&
         is_aligned(problem.coefficients) && is_aligned(problem.norm);
}

ConvBnWgradArguments conv_bn_wgrad_arguments(const RfConvBnWgrad& problem, const RfConvPlan& plan,
                                             void* workspace) {
  const RfConvGradient& product = problem.product;
  const RfConvConfiguration& tile = *rf_conv_bn_wgrad_configuration(plan.configuration);
  ConvBnWgradArguments arguments{};
  arguments.product = conv_wgrad_arguments(product, plan, tile, workspace);
  if (problem.affine != 0) arguments.coefficients = static_cast<const float*>(problem.coefficients);
  if (problem.normed != 0) arguments.norm = static_cast<const float*>(problem.norm);
  arguments.filters = narrowed(product.weight_size[0]);
  arguments.channels = narrowed(product.x_size[1]);
  arguments.float_dweight = static_cast<DataType>(problem.weight_dtype) == DataType::kFloat32;
  return arguments;
}

}  // namespace resnet_fused

extern "C" int rf_conv_bn_wgrad_cuda(const RfConvBnWgrad* problem, const RfConvPlan* plan,
                                     void* workspace, void* stream) {
  using namespace resnet_fused;
  if (plan->launches == 0) return 0;
  constexpr Launches<ConvBnWgradArguments> kLaunches{
      launch_conv_bn_wgrad_bfloat16, launch_conv_bn_wgrad_float16, launch_conv_bn_wgrad_float32};
  return kLaunches(problem->product.dtype, conv_bn_wgrad_arguments(*problem, *plan, workspace),
                   plan->configuration, stream);
}
