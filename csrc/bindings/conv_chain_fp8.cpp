// conv_chain_fp8_out, conv_chain_fp8_plan, conv_chain_fp8_configurations: checks, then the plan,
// then the CUDA launch.
#include "../launch/conv_chain_fp8.h"

#include <string>
#include <vector>

#include "conv_chain.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvChainFp8> kConvChainFp8 = {
    "conv_chain_fp8", rf_conv_chain_fp8_configurations, rf_conv_chain_fp8_configuration,
    rf_conv_chain_fp8_plan, rf_conv_chain_fp8_cuda};

// Everything but the per-channel vectors, the factors and the devices, which no plan depends on.
RfConvChainFp8 problem_of(const ChainTensors& tensors, int64_t projection_stride,
                          int64_t out_stride) {
  if (tensors.x.scalar_type() != ScalarType::Float8_e4m3fn) {
    fail("x: expected float8_e4m3fn, got ", name_of(tensors.x.scalar_type()));
  }
  RfConvChainFp8 problem{};
  problem.chain = chain_problem(tensors, projection_stride, out_stride);
  problem.chain.dtype = kFloat8E4M3;
  return problem;
}

PlanResult conv_chain_fp8_plan(Tensor x, Tensor weight, Maybe residual, Maybe projected,
                               Maybe projection_weight, Maybe next_weight, Maybe front_weight,
                               Tensor following, int64_t projection_stride, int64_t out_stride,
                               Tensor out, std::vector<int64_t> gpu, int64_t configuration,
                               int64_t splits) {
  const RfConvChainFp8 problem = problem_of({x, weight, residual, projected, projection_weight,
                                             next_weight, front_weight, following, out},
                                            projection_stride, out_stride);
  return plan_conv(kConvChainFp8, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_chain_fp8_configurations() {
  return configuration_names(kConvChainFp8);
}

void conv_chain_fp8_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Maybe residual,
                        Maybe projected, Maybe projection_weight, Maybe projection_scale,
                        Maybe projection_shift, Maybe next_weight, Maybe next_scale,
                        Maybe next_shift, Maybe front_weight, Maybe front_scale, Maybe front_shift,
                        int64_t projection_stride, int64_t out_stride, double residual_factor,
                        double projection_factor, double out_factor, double next_factor,
                        bool dependent, bool follows, int64_t configuration, int64_t splits,
                        Tensor out, Tensor following) {
  const ChainTensors tensors{x,           weight,       residual,  projected, projection_weight,
                             next_weight, front_weight, following, out};
  RfConvChainFp8 problem = problem_of(tensors, projection_stride, out_stride);
  add_vectors(problem.chain, tensors,
              {scale, shift, projection_scale, projection_shift, next_scale, next_shift,
               front_scale, front_shift},
              {dependent, follows});
  problem.residual_factor = static_cast<float>(residual_factor);
  problem.projection_factor = static_cast<float>(projection_factor);
  problem.out_factor = static_cast<float>(out_factor);
  problem.next_factor = static_cast<float>(next_factor);
  run_conv(kConvChainFp8, problem, configuration, splits, out);
}

}  // namespace

void define_conv_chain_fp8(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_chain_fp8_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor? projected, Tensor? projection_weight, Tensor? projection_scale, "
      "Tensor? projection_shift, Tensor? next_weight, Tensor? next_scale, Tensor? next_shift, "
      "Tensor? front_weight, Tensor? front_scale, Tensor? front_shift, "
      "int projection_stride, int out_stride, float residual_factor, float projection_factor, "
      "float out_factor, float next_factor, bool dependent, bool follows, int configuration, "
      "int splits, Tensor(a!) out, Tensor(b!) following) -> ()");
  library.def(
      "conv_chain_fp8_plan(Tensor x, Tensor weight, Tensor? residual, Tensor? projected, "
      "Tensor? projection_weight, Tensor? next_weight, Tensor? front_weight, Tensor following, "
      "int projection_stride, int out_stride, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_chain_fp8_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_chain_fp8_out", TORCH_BOX(&conv_chain_fp8_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_chain_fp8_out", TORCH_BOX(&conv_chain_fp8_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_chain_fp8_plan", TORCH_BOX(&conv_chain_fp8_plan));
  library.impl("conv_chain_fp8_configurations", TORCH_BOX(&conv_chain_fp8_configurations));
}

}  // namespace resnet_fused
