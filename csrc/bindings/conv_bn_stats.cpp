// conv_bn_stats_out, conv_bn_stats_plan, conv_bn_stats_configurations: checks, then the plan, then
// the CUDA launch.
#include "conv_bn_stats.h"

#include <string>

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvBnStats> kConvBnStats = {
    "conv_bn_stats", rf_conv_bn_stats_configurations, rf_conv_bn_stats_configuration,
    rf_conv_bn_stats_plan, rf_conv_bn_stats_cuda};
constexpr int64_t kNormRows = 4;   // scale, shift, mean, invstd
constexpr int64_t kStatsRows = 2;  // mean, M2

}  // namespace

RfConvBnStats stats_problem(const Tensor& x, const std::optional<Tensor>& norm,
                            const Tensor& weight, const Pair& stride, const Pair& padding,
                            const Pair& dilation, int64_t groups, bool allow_tf32,
                            const Tensor& out) {
  const DataType dtype = conv_type("x", x);
  check_dtype("weight", weight, "x", x);
  check_dtype("out", out, "x", x);
  RfConvBnStats problem{};
  problem.conv = conv_problem(x, weight, std::nullopt, stride, padding, dilation, groups, out);
  problem.conv.dtype = static_cast<int32_t>(dtype);
  problem.conv.allow_tf32 = allow_tf32;
  if (norm) {
    check_rows("norm", *norm, kNormRows, x.size(1));
    problem.norm = norm->const_data_ptr();
    problem.normed = 1;
  }
  return problem;
}

void add_stats(RfConvBnStats& problem, const Tensor& x, const std::optional<Tensor>& norm,
               const Tensor& weight, const Tensor& out, const Tensor& stats) {
  check_rows("stats", stats, kStatsRows, weight.size(0));
  check_device("weight", weight, "x", x);
  check_device("out", out, "x", x);
  check_device("stats", stats, "x", x);
  if (norm) check_device("norm", *norm, "x", x);
  const OutputMemory memory(out);
  memory.apart_from("x", x);
  memory.apart_from("norm", norm);
  memory.apart_from("weight", weight);
  memory.apart_from("stats", stats);
  const OutputMemory measured(stats, "stats");
  measured.apart_from("x", x);
  measured.apart_from("weight", weight);
  measured.apart_from("norm", norm);
  problem.stats = stats.mutable_data_ptr();
}

namespace {

PlanResult conv_bn_stats_plan(Tensor x, std::optional<Tensor> norm, Tensor weight, Pair stride,
                              Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                              Tensor out, std::vector<int64_t> gpu, int64_t configuration,
                              int64_t splits) {
  const RfConvBnStats problem =
      stats_problem(x, norm, weight, stride, padding, dilation, groups, allow_tf32, out);
  return plan_conv(kConvBnStats, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_stats_configurations() {
  return configuration_names(kConvBnStats);
}

void conv_bn_stats_out(Tensor x, std::optional<Tensor> norm, Tensor weight, Pair stride,
                       Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                       int64_t configuration, int64_t splits, Tensor out, Tensor stats) {
  RfConvBnStats problem =
      stats_problem(x, norm, weight, stride, padding, dilation, groups, allow_tf32, out);
  add_stats(problem, x, norm, weight, out, stats);
  if (out.is_cuda() && out.numel() == 0) torch::stable::zero_(stats);
  run_conv(kConvBnStats, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_stats(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_stats_out(Tensor x, Tensor? norm, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool allow_tf32, int configuration, int splits, "
      "Tensor(a!) out, Tensor(b!) stats) -> ()");
  library.def(
      "conv_bn_stats_plan(Tensor x, Tensor? norm, Tensor weight, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_stats_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_stats_out", TORCH_BOX(&conv_bn_stats_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_stats_out", TORCH_BOX(&conv_bn_stats_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_stats_plan", TORCH_BOX(&conv_bn_stats_plan));
  library.impl("conv_bn_stats_configurations", TORCH_BOX(&conv_bn_stats_configurations));
}

}  // namespace resnet_fused
