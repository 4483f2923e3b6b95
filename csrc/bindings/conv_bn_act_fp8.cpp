// conv_bn_act_fp8_out, conv_bn_act_fp8_plan, conv_bn_act_fp8_configurations: checks, then the plan,
// then the CUDA launch.
#include "../launch/conv_bn_act_fp8.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvBnActFp8> kConvBnActFp8 = {
    "conv_bn_act_fp8", rf_conv_bn_act_fp8_configurations, rf_conv_bn_act_fp8_configuration,
    rf_conv_bn_act_fp8_plan, rf_conv_bn_act_fp8_cuda};

void check_e4m3(const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Float8_e4m3fn) {
    fail(name, ": expected float8_e4m3fn, got ", name_of(tensor.scalar_type()));
  }
}

// Of the residual or out; the plan says which of them it serves.
int32_t type_of(const char* name, const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float8_e4m3fn) return kFloat8E4M3;
  return static_cast<int32_t>(conv_type(name, tensor));
}

// Everything but the per-channel vectors, the factors and the devices, which no plan depends on.
RfConvBnActFp8 problem_of(const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& residual, const Pair& stride,
                          const Pair& padding, const Pair& dilation, int64_t groups,
                          const Tensor& out) {
  check_e4m3("x", x);
  check_e4m3("weight", weight);
  RfConvBnActFp8 problem{};
  problem.conv = conv_problem(x, weight, residual, stride, padding, dilation, groups, out);
  problem.conv.dtype = kFloat8E4M3;
  problem.residual_dtype = residual ? type_of("residual", *residual) : kFloat8E4M3;
  problem.out_dtype = type_of("out", out);
  return problem;
}

PlanResult conv_bn_act_fp8_plan(Tensor x, Tensor weight, std::optional<Tensor> residual,
                                Pair stride, Pair padding, Pair dilation, int64_t groups,
                                Tensor out, std::vector<int64_t> gpu, int64_t configuration,
                                int64_t splits) {
  const RfConvBnActFp8 problem =
      problem_of(x, weight, residual, stride, padding, dilation, groups, out);
  return plan_conv(kConvBnActFp8, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_act_fp8_configurations() {
  return configuration_names(kConvBnActFp8);
}

void conv_bn_act_fp8_out(Tensor x, Tensor weight, Tensor scale, Tensor shift,
                         std::optional<Tensor> residual, Pair stride, Pair padding, Pair dilation,
                         int64_t groups, bool relu, double residual_factor, double out_factor,
                         bool dependent, bool follows, int64_t configuration, int64_t splits,
                         Tensor out) {
  RfConvBnActFp8 problem = problem_of(x, weight, residual, stride, padding, dilation, groups, out);
  add_epilogue(problem.conv, x, weight, scale, shift, residual, relu, {dependent, follows}, out);
  problem.residual_factor = static_cast<float>(residual_factor);
  problem.out_factor = static_cast<float>(out_factor);
  run_conv(kConvBnActFp8, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_act_fp8(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_act_fp8_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, "
      "float residual_factor, float out_factor, bool dependent, bool follows, int configuration, "
      "int splits, Tensor(a!) out) -> ()");
  library.def(
      "conv_bn_act_fp8_plan(Tensor x, Tensor weight, Tensor? residual, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_act_fp8_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_act_fp8_out", TORCH_BOX(&conv_bn_act_fp8_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_act_fp8_out", TORCH_BOX(&conv_bn_act_fp8_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_act_fp8_plan", TORCH_BOX(&conv_bn_act_fp8_plan));
  library.impl("conv_bn_act_fp8_configurations", TORCH_BOX(&conv_bn_act_fp8_configurations));
}

}  // namespace resnet_fused
