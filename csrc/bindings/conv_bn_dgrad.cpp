// conv_bn_dgrad_out, conv_bn_dgrad_plan, conv_bn_dgrad_configurations: checks, then the plan, then
// the CUDA launch.
#include "conv_bn_dgrad.h"

#include <optional>
#include <string>
#include <vector>

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvBnDgrad> kConvBnDgrad = {
    "conv_bn_dgrad", rf_conv_bn_dgrad_configurations, rf_conv_bn_dgrad_configuration,
    rf_conv_bn_dgrad_plan, rf_conv_bn_dgrad_cuda};
constexpr int64_t kCoefficientRows = 3;  // A, B, C
constexpr int64_t kSumRows = 2;

void check_pair(const char* one, bool has_one, const char* other, bool has_other) {
  if (has_one != has_other) fail(one, ": expected with ", other, ", or neither of them");
}

}  // namespace

RfConvBnDgrad bn_dgrad_problem(const BnDgradOperands& given, int64_t addend_stride,
                               const Pair& stride, const Pair& padding, const Pair& dilation,
                               int64_t groups, bool allow_tf32, const NamedTensor& result) {
  const Tensor& out = result.tensor;
  const Tensor& dz = given.dz;
  RfConvBnDgrad problem{};
  problem.conv = gradient_problem({"dz", dz}, given.y, result, {"weight", given.weight}, stride,
                                  padding, dilation, groups, allow_tf32);
  check_dtype("weight", given.weight, "dz", dz);
  check_pair("y", given.y.has_value(), "coefficients", given.coefficients.has_value());
  check_pair("raw", given.raw.has_value(), "norm", given.norm.has_value());
  if (given.y) {
    check_rows("coefficients", *given.coefficients, kCoefficientRows, dz.size(1));
    problem.conv.scale = given.coefficients->const_data_ptr();
    problem.affine = 1;
  }
  constexpr int64_t kMostStep = int64_t{1} << 30;
  if (addend_stride < 1 || addend_stride > kMostStep) {
    fail("addend_stride: expected 1 to ", kMostStep, ", got ", addend_stride);
  }
  problem.addend_step = addend_stride;
  const std::vector<int64_t> shape(out.sizes().begin(), out.sizes().end());
  if (given.addend) {
    const auto each = [&](int d) { return (shape[d] + addend_stride - 1) / addend_stride; };
    check_dtype("addend", *given.addend, "dz", dz);
    const std::string what = std::string("every addend_stride-th pixel of ") + result.name;
    check_shape("addend", *given.addend, what.c_str(), {shape[0], shape[1], each(2), each(3)});
    problem.addend = given.addend->const_data_ptr();
    copy_strides(*given.addend, problem.addend_stride);
    problem.added = 1;
  }
  if (given.raw) {
    check_dtype("raw", *given.raw, "dz", dz);
    check_shape("raw", *given.raw, (result.name + std::string("'s shape")).c_str(), shape);
    check_rows("norm", *given.norm, kNormRows, shape[1]);
    problem.raw = given.raw->const_data_ptr();
    problem.norm = given.norm->const_data_ptr();
    copy_strides(*given.raw, problem.raw_stride);
    problem.reduced = 1;
  }
  return problem;
}

namespace {

PlanResult conv_bn_dgrad_plan(Tensor dz, std::optional<Tensor> y,
                              std::optional<Tensor> coefficients, Tensor weight,
                              std::optional<Tensor> addend, std::optional<Tensor> raw,
                              std::optional<Tensor> norm, int64_t addend_stride, Pair stride,
                              Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                              Tensor out, std::vector<int64_t> gpu, int64_t configuration,
                              int64_t splits) {
  const RfConvBnDgrad problem =
      bn_dgrad_problem({dz, y, coefficients, weight, addend, raw, norm}, addend_stride, stride,
                       padding, dilation, groups, allow_tf32, {"out", out});
  return plan_conv(kConvBnDgrad, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_dgrad_configurations() {
  return configuration_names(kConvBnDgrad);
}

void conv_bn_dgrad_out(Tensor dz, std::optional<Tensor> y, std::optional<Tensor> coefficients,
                       Tensor weight, std::optional<Tensor> addend, std::optional<Tensor> raw,
                       std::optional<Tensor> norm, int64_t addend_stride, Pair stride, Pair padding,
                       Pair dilation, int64_t groups, bool allow_tf32, int64_t configuration,
                       int64_t splits, Tensor out, Tensor sums) {
  const BnDgradOperands given{dz, y, coefficients, weight, addend, raw, norm};
  const NamedTensor result{"out", out};
  RfConvBnDgrad problem =
      bn_dgrad_problem(given, addend_stride, stride, padding, dilation, groups, allow_tf32, result);
  check_rows("sums", sums, raw ? kSumRows : 0, out.size(1));
  add_sums(problem, dz, [&](const auto& visit) { given.others(visit); }, result, sums);
  run_conv(kConvBnDgrad, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_dgrad(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_dgrad_out(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor? raw, Tensor? norm, int addend_stride, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32, int configuration, "
      "int splits, Tensor(a!) out, Tensor(b!) sums) -> ()");
  library.def(
      "conv_bn_dgrad_plan(Tensor dz, Tensor? y, Tensor? coefficients, Tensor weight, "
      "Tensor? addend, Tensor? raw, Tensor? norm, int addend_stride, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, "
      "int configuration, int splits) -> (int configuration, int splits, int workspace_bytes, "
      "float cycles, str why)");
  library.def("conv_bn_dgrad_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_dgrad_out", TORCH_BOX(&conv_bn_dgrad_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_dgrad_out", TORCH_BOX(&conv_bn_dgrad_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_dgrad_plan", TORCH_BOX(&conv_bn_dgrad_plan));
  library.impl("conv_bn_dgrad_configurations", TORCH_BOX(&conv_bn_dgrad_configurations));
}

}  // namespace resnet_fused
