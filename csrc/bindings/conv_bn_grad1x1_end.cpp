// conv_bn_grad1x1_end_out, conv_bn_grad1x1_end_plan, conv_bn_grad1x1_end_configurations: checks,
// then the plan, then the CUDA launch.
#include "../launch/conv_bn_grad1x1_end.h"

#include <optional>
#include <string>
#include <vector>

#include "conv_bn_dgrad_end.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvBnGrad1x1End> kConvBnGrad1x1End = {
    "conv_bn_grad1x1_end", rf_conv_bn_grad1x1_end_configurations,
    rf_conv_bn_grad1x1_end_configuration, rf_conv_bn_grad1x1_end_plan, rf_conv_bn_grad1x1_end_cuda};
constexpr int64_t kSumRows = 2;  // and one for a projection

// Everything but the sums, the weights' gradient and the devices, which no plan depends on.
RfConvBnGrad1x1End problem_of(const BnDgradOperands& image, const EndOperands& end,
                              int64_t addend_stride, const Tensor& dx) {
  RfConvBnGrad1x1End problem{};
  problem.end =
      bn_dgrad_end_problem(image, end, addend_stride, {1, 1}, {0, 0}, {1, 1}, 1, false, dx);
  problem.dweight_dtype = problem.end.image.conv.dtype;
  return problem;
}

PlanResult conv_bn_grad1x1_end_plan(Tensor dz, std::optional<Tensor> y,
                                    std::optional<Tensor> coefficients, Tensor weight,
                                    std::optional<Tensor> addend, Tensor out, Tensor raw,
                                    Tensor norm, std::optional<Tensor> residual,
                                    std::optional<Tensor> residual_norm, int64_t addend_stride,
                                    Tensor dx, std::vector<int64_t> gpu, int64_t configuration,
                                    int64_t splits) {
  const std::optional<Tensor> below(raw), below_norm(norm);
  const RfConvBnGrad1x1End problem =
      problem_of({dz, y, coefficients, weight, addend, below, below_norm},
                 {out, residual, residual_norm}, addend_stride, dx);
  return plan_conv(kConvBnGrad1x1End, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_grad1x1_end_configurations() {
  return configuration_names(kConvBnGrad1x1End);
}

void conv_bn_grad1x1_end_out(Tensor dz, std::optional<Tensor> y, std::optional<Tensor> coefficients,
                             Tensor weight, std::optional<Tensor> addend, Tensor out, Tensor raw,
                             Tensor norm, std::optional<Tensor> residual,
                             std::optional<Tensor> residual_norm, int64_t addend_stride,
                             int64_t configuration, int64_t splits, Tensor dx, Tensor sums,
                             Tensor dweight) {
  const std::optional<Tensor> below(raw), below_norm(norm);
  const BnDgradOperands image{dz, y, coefficients, weight, addend, below, below_norm};
  RfConvBnGrad1x1End problem = problem_of(image, {out, residual, residual_norm}, addend_stride, dx);
  check_rows("sums", sums, kSumRows + problem.end.projected, dx.size(1));
  check_shape("dweight", dweight, "weight's shape", {weight.sizes().begin(), weight.sizes().end()});
  if (dweight.scalar_type() != ScalarType::Float) check_dtype("dweight", dweight, "dz", dz);
  problem.dweight_dtype = static_cast<int32_t>(data_type("dweight", dweight));
  copy_strides(dweight, problem.dweight_stride);
  const auto others = [&](const auto& visit) {
    image.others(visit);
    visit("out", out);
    if (residual) visit("residual", *residual);
    if (residual_norm) visit("residual_norm", *residual_norm);
  };
  const OutputMemory kept(dweight, "dweight");
  check_device("dweight", dweight, "dz", dz);
  kept.apart_from("dz", dz);
  kept.apart_from("dx", dx);
  kept.apart_from("sums", sums);
  others([&](const char* name, const Tensor& one) { kept.apart_from(name, one); });
  add_sums(problem.end.image, dz, others, {"dx", dx}, sums);
  problem.dweight = dweight.mutable_data_ptr();
  if (dx.is_cuda() && dx.numel() == 0) torch::stable::zero_(dweight);
  run_conv(kConvBnGrad1x1End, problem, configuration, splits, dx);
}

}  // namespace

void define_conv_bn_grad1x1_end(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_grad1x1_end_out(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor out, Tensor raw, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, int addend_stride, int configuration, int splits, Tensor(a!) dx, "
      "Tensor(b!) sums, Tensor(c!) dweight) -> ()");
  library.def(
      "conv_bn_grad1x1_end_plan(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor out, Tensor raw, Tensor norm, Tensor? residual, "
      "Tensor? residual_norm, int addend_stride, Tensor dx, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_grad1x1_end_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_grad1x1_end_out", TORCH_BOX(&conv_bn_grad1x1_end_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_grad1x1_end_out", TORCH_BOX(&conv_bn_grad1x1_end_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_grad1x1_end_plan", TORCH_BOX(&conv_bn_grad1x1_end_plan));
  library.impl("conv_bn_grad1x1_end_configurations",
               TORCH_BOX(&conv_bn_grad1x1_end_configurations));
}

}  // namespace resnet_fused
