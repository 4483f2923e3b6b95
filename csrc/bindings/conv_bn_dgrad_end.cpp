// conv_bn_dgrad_end_out, conv_bn_dgrad_end_plan, conv_bn_dgrad_end_configurations: checks, then the
// plan, then the CUDA launch.
#include "conv_bn_dgrad_end.h"

#include <optional>
#include <string>
#include <vector>

namespace resnet_fused {

RfConvBnDgradEnd bn_dgrad_end_problem(const BnDgradOperands& image, const EndOperands& end,
                                      int64_t addend_stride, const Pair& stride,
                                      const Pair& padding, const Pair& dilation, int64_t groups,
                                      bool allow_tf32, const Tensor& dx) {
  RfConvBnDgradEnd problem{};
  problem.image = bn_dgrad_problem(image, addend_stride, stride, padding, dilation, groups,
                                   allow_tf32, {"dx", dx});
  const std::vector<int64_t> shape(dx.sizes().begin(), dx.sizes().end());
  check_dtype("out", end.out, "dz", image.dz);
  check_shape("out", end.out, "dx's shape", shape);
  problem.out = end.out.const_data_ptr();
  copy_strides(end.out, problem.out_stride);
  if (end.residual.has_value() != end.residual_norm.has_value()) {
    fail("residual: expected with residual_norm, or neither of them");
  }
  if (!end.residual) return problem;
  check_dtype("residual", *end.residual, "dz", image.dz);
  check_shape("residual", *end.residual, "dx's shape", shape);
  check_rows("residual_norm", *end.residual_norm, kNormRows, shape[1]);
  problem.residual = end.residual->const_data_ptr();
  problem.residual_norm = end.residual_norm->const_data_ptr();
  copy_strides(*end.residual, problem.residual_stride);
  problem.projected = 1;
  return problem;
}

namespace {

constexpr ConvKernel<RfConvBnDgradEnd> kConvBnDgradEnd = {
    "conv_bn_dgrad_end", rf_conv_bn_dgrad_end_configurations, rf_conv_bn_dgrad_end_configuration,
    rf_conv_bn_dgrad_end_plan, rf_conv_bn_dgrad_end_cuda};
constexpr int64_t kSumRows = 2;  // and one for a projection

PlanResult conv_bn_dgrad_end_plan(Tensor dz, std::optional<Tensor> y,
                                  std::optional<Tensor> coefficients, Tensor weight,
                                  std::optional<Tensor> addend, Tensor out, Tensor raw, Tensor norm,
                                  std::optional<Tensor> residual,
                                  std::optional<Tensor> residual_norm, int64_t addend_stride,
                                  Pair stride, Pair padding, Pair dilation, int64_t groups,
                                  bool allow_tf32, Tensor dx, std::vector<int64_t> gpu,
                                  int64_t configuration, int64_t splits) {
  const std::optional<Tensor> below(raw), below_norm(norm);
  const RfConvBnDgradEnd problem = bn_dgrad_end_problem(
      {dz, y, coefficients, weight, addend, below, below_norm}, {out, residual, residual_norm},
      addend_stride, stride, padding, dilation, groups, allow_tf32, dx);
  return plan_conv(kConvBnDgradEnd, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_dgrad_end_configurations() {
  return configuration_names(kConvBnDgradEnd);
}

void conv_bn_dgrad_end_out(Tensor dz, std::optional<Tensor> y, std::optional<Tensor> coefficients,
                           Tensor weight, std::optional<Tensor> addend, Tensor out, Tensor raw,
                           Tensor norm, std::optional<Tensor> residual,
                           std::optional<Tensor> residual_norm, int64_t addend_stride, Pair stride,
                           Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                           int64_t configuration, int64_t splits, Tensor dx, Tensor sums) {
  const std::optional<Tensor> below(raw), below_norm(norm);
  const BnDgradOperands image{dz, y, coefficients, weight, addend, below, below_norm};
  RfConvBnDgradEnd problem =
      bn_dgrad_end_problem(image, {out, residual, residual_norm}, addend_stride, stride, padding,
                           dilation, groups, allow_tf32, dx);
  check_rows("sums", sums, kSumRows + problem.projected, dx.size(1));
  const auto others = [&](const auto& visit) {
    image.others(visit);
    visit("out", out);
    if (residual) visit("residual", *residual);
    if (residual_norm) visit("residual_norm", *residual_norm);
  };
  add_sums(problem.image, dz, others, {"dx", dx}, sums);
  run_conv(kConvBnDgradEnd, problem, configuration, splits, dx);
}

}  // namespace

void define_conv_bn_dgrad_end(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_dgrad_end_out(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor out, Tensor raw, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, int addend_stride, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool allow_tf32, int configuration, int splits, Tensor(a!) dx, "
      "Tensor(b!) sums) -> ()");
  library.def(
      "conv_bn_dgrad_end_plan(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor out, Tensor raw, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, int addend_stride, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool allow_tf32, Tensor dx, int[] gpu, int configuration, int splits) -> "
      "(int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_dgrad_end_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_dgrad_end_out", TORCH_BOX(&conv_bn_dgrad_end_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_dgrad_end_out", TORCH_BOX(&conv_bn_dgrad_end_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_dgrad_end_plan", TORCH_BOX(&conv_bn_dgrad_end_plan));
  library.impl("conv_bn_dgrad_end_configurations", TORCH_BOX(&conv_bn_dgrad_end_configurations));
}

}  // namespace resnet_fused
