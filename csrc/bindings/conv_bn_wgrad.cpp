// conv_bn_wgrad_out, conv_bn_wgrad_plan, conv_bn_wgrad_configurations: checks, then the plan, then
// the CUDA launch.
#include "../launch/conv_bn_wgrad.h"

#include <optional>
#include <string>
#include <vector>

#include "conv_gradients.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvBnWgrad> kConvBnWgrad = {
    "conv_bn_wgrad", rf_conv_bn_wgrad_configurations, rf_conv_bn_wgrad_configuration,
    rf_conv_bn_wgrad_plan, rf_conv_bn_wgrad_cuda};
constexpr int64_t kNormRows = 4;         // scale, shift, mean, invstd
constexpr int64_t kCoefficientRows = 3;  // a, b, c

// Everything but the devices, which no plan depends on.
RfConvBnWgrad problem_of(const Tensor& dz, const std::optional<Tensor>& y,
                         const std::optional<Tensor>& coefficients, const Tensor& x,
                         const std::optional<Tensor>& norm, const Pair& stride, const Pair& padding,
                         const Pair& dilation, int64_t groups, bool allow_tf32, const Tensor& out) {
  RfConvBnWgrad problem{};
  problem.product = gradient_problem({"dz", dz}, y, {"x", x}, {"out", out}, stride, padding,
                                     dilation, groups, allow_tf32);
  if (out.scalar_type() != ScalarType::Float) check_dtype("out", out, "dz", dz);
  problem.weight_dtype = static_cast<int32_t>(data_type("out", out));
  if (y.has_value() != coefficients.has_value()) {
    fail(y ? "coefficients" : "y", ": expected beside ", y ? "y" : "coefficients", ", got none");
  }
  if (coefficients) {
    check_rows("coefficients", *coefficients, kCoefficientRows, dz.size(1));
    problem.coefficients = coefficients->const_data_ptr();
    problem.affine = 1;
  }
  if (norm) {
    check_rows("norm", *norm, kNormRows, x.size(1));
    problem.norm = norm->const_data_ptr();
    problem.normed = 1;
  }
  return problem;
}

PlanResult conv_bn_wgrad_plan(Tensor dz, std::optional<Tensor> y,
                              std::optional<Tensor> coefficients, Tensor x,
                              std::optional<Tensor> norm, Pair stride, Pair padding, Pair dilation,
                              int64_t groups, bool allow_tf32, Tensor out, std::vector<int64_t> gpu,
                              int64_t configuration, int64_t splits) {
  const RfConvBnWgrad problem =
      problem_of(dz, y, coefficients, x, norm, stride, padding, dilation, groups, allow_tf32, out);
  return plan_conv(kConvBnWgrad, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_wgrad_configurations() {
  return configuration_names(kConvBnWgrad);
}

void conv_bn_wgrad_out(Tensor dz, std::optional<Tensor> y, std::optional<Tensor> coefficients,
                       Tensor x, std::optional<Tensor> norm, Pair stride, Pair padding,
                       Pair dilation, int64_t groups, bool allow_tf32, int64_t configuration,
                       int64_t splits, Tensor out) {
  const RfConvBnWgrad problem =
      problem_of(dz, y, coefficients, x, norm, stride, padding, dilation, groups, allow_tf32, out);
  check_device("x", x, "dz", dz);
  check_device("out", out, "dz", dz);
  if (y) check_device("y", *y, "dz", dz);
  if (coefficients) check_device("coefficients", *coefficients, "dz", dz);
  if (norm) check_device("norm", *norm, "dz", dz);
  const OutputMemory memory(out);
  memory.apart_from("dz", dz);
  memory.apart_from("y", y);
  memory.apart_from("coefficients", coefficients);
  memory.apart_from("x", x);
  memory.apart_from("norm", norm);
  run_conv(kConvBnWgrad, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_wgrad(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_wgrad_out(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool allow_tf32, "
      "int configuration, int splits, Tensor(a!) out) -> ()");
  library.def(
      "conv_bn_wgrad_plan(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool allow_tf32, Tensor out, "
      "int[] gpu, int configuration, int splits) -> "
      "(int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_wgrad_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_wgrad_out", TORCH_BOX(&conv_bn_wgrad_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_wgrad_out", TORCH_BOX(&conv_bn_wgrad_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_wgrad_plan", TORCH_BOX(&conv_bn_wgrad_plan));
  library.impl("conv_bn_wgrad_configurations", TORCH_BOX(&conv_bn_wgrad_configurations));
}

}  // namespace resnet_fused
