// conv_dgrad_out, conv_wgrad_out, their plans and configurations: checks, then the plan, then the
// CUDA launch.
#include "../launch/conv_gradients.h"

#include <optional>
#include <string>
#include <vector>

#include "conv_gradient_problem.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvGradient> kConvDgrad = {"conv_dgrad", rf_conv_dgrad_configurations,
                                                   rf_conv_dgrad_configuration, rf_conv_dgrad_plan,
                                                   rf_conv_dgrad_cuda};
constexpr ConvKernel<RfConvGradient> kConvWgrad = {"conv_wgrad", rf_conv_wgrad_configurations,
                                                   rf_conv_wgrad_configuration, rf_conv_wgrad_plan,
                                                   rf_conv_wgrad_cuda};

// As gradient_problem; all tensors have one dtype.
RfConvGradient problem_of(const Tensor& dy, const std::optional<Tensor>& y, const Operand& x,
                          const Operand& weight, const Pair& stride, const Pair& padding,
                          const Pair& dilation, int64_t groups, bool allow_tf32) {
  check_dtype(weight.name, weight.tensor, "dy", dy);
  return gradient_problem({"dy", dy}, y, x, weight, stride, padding, dilation, groups, allow_tf32);
}

void run(const ConvKernel<RfConvGradient>& kernel, RfConvGradient& problem, const Tensor& dy,
         const std::optional<Tensor>& y, const Operand& read, const Tensor& scale,
         int64_t configuration, int64_t splits, const Tensor& out) {
  check_device(read.name, read.tensor, "dy", dy);
  check_device("out", out, "dy", dy);
  if (y) check_device("y", *y, "dy", dy);
  check_per_channel("scale", scale, "dy", dy, dy.size(1));
  const OutputMemory memory(out);
  memory.apart_from("dy", dy);
  memory.apart_from("y", y);
  memory.apart_from(read.name, read.tensor);
  memory.apart_from("scale", scale);
  problem.scale = scale.const_data_ptr();
  run_conv(kernel, problem, configuration, splits, out);
}

PlanResult conv_dgrad_plan(Tensor dy, std::optional<Tensor> y, Tensor weight, Pair stride,
                           Pair padding, Pair dilation, int64_t groups, bool allow_tf32, Tensor out,
                           std::vector<int64_t> gpu, int64_t configuration, int64_t splits) {
  const RfConvGradient problem = problem_of(dy, y, {"out", out}, {"weight", weight}, stride,
                                            padding, dilation, groups, allow_tf32);
  return plan_conv(kConvDgrad, problem, gpu_of(gpu), configuration, splits);
}

PlanResult conv_wgrad_plan(Tensor dy, std::optional<Tensor> y, Tensor x, Pair stride, Pair padding,
                           Pair dilation, int64_t groups, bool allow_tf32, Tensor out,
                           std::vector<int64_t> gpu, int64_t configuration, int64_t splits) {
  const RfConvGradient problem =
      problem_of(dy, y, {"x", x}, {"out", out}, stride, padding, dilation, groups, allow_tf32);
  return plan_conv(kConvWgrad, problem, gpu_of(gpu), configuration, splits);
}

void conv_dgrad_out(Tensor dy, std::optional<Tensor> y, Tensor weight, Tensor scale, Pair stride,
                    Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                    int64_t configuration, int64_t splits, Tensor out) {
  RfConvGradient problem = problem_of(dy, y, {"out", out}, {"weight", weight}, stride, padding,
                                      dilation, groups, allow_tf32);
  run(kConvDgrad, problem, dy, y, {"weight", weight}, scale, configuration, splits, out);
}

void conv_wgrad_out(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor scale, Pair stride,
                    Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                    int64_t configuration, int64_t splits, Tensor out) {
  RfConvGradient problem =
      problem_of(dy, y, {"x", x}, {"out", out}, stride, padding, dilation, groups, allow_tf32);
  run(kConvWgrad, problem, dy, y, {"x", x}, scale, configuration, splits, out);
}

std::vector<std::string> conv_dgrad_configurations() { return configuration_names(kConvDgrad); }
std::vector<std::string> conv_wgrad_configurations() { return configuration_names(kConvWgrad); }

}  // namespace

void define_conv_gradients(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_dgrad_out(Tensor dy, Tensor? y, Tensor weight, Tensor scale, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32, int configuration, "
      "int splits, Tensor(a!) out) -> ()");
  library.def(
      "conv_wgrad_out(Tensor dy, Tensor? y, Tensor x, Tensor scale, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32, int configuration, "
      "int splits, Tensor(a!) out) -> ()");
  library.def(
      "conv_dgrad_plan(Tensor dy, Tensor? y, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def(
      "conv_wgrad_plan(Tensor dy, Tensor? y, Tensor x, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_dgrad_configurations() -> str[]");
  library.def("conv_wgrad_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_dgrad_out", TORCH_BOX(&conv_dgrad_out));
  library.impl("conv_wgrad_out", TORCH_BOX(&conv_wgrad_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_dgrad_out", TORCH_BOX(&conv_dgrad_out));
  library.impl("conv_wgrad_out", TORCH_BOX(&conv_wgrad_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_dgrad_plan", TORCH_BOX(&conv_dgrad_plan));
  library.impl("conv_wgrad_plan", TORCH_BOX(&conv_wgrad_plan));
  library.impl("conv_dgrad_configurations", TORCH_BOX(&conv_dgrad_configurations));
  library.impl("conv_wgrad_configurations", TORCH_BOX(&conv_wgrad_configurations));
}

}  // namespace resnet_fused
