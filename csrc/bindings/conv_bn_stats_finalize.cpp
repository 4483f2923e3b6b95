// conv_bn_stats_finalize_out: conv_bn_stats, whose launch finalizes its output's BatchNorm too.
// Plans and configurations are conv_bn_stats', under this op's name, by which it is admitted.
#include <string>

#include "channel_values.h"
#include "conv_bn_stats.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvBnStats> kFinalize = {
    "conv_bn_stats_finalize", rf_conv_bn_stats_configurations, rf_conv_bn_stats_configuration,
    rf_conv_bn_stats_plan, rf_conv_bn_stats_cuda};
constexpr int64_t kNormRows = 4;  // scale, shift, mean, invstd
constexpr int64_t kKeptRows = 2;  // the running mean and variance as they were

PlanResult finalize_plan(Tensor x, std::optional<Tensor> norm, Tensor weight, Pair stride,
                         Pair padding, Pair dilation, int64_t groups, bool allow_tf32, Tensor out,
                         std::vector<int64_t> gpu, int64_t configuration, int64_t splits) {
  const RfConvBnStats problem =
      stats_problem(x, norm, weight, stride, padding, dilation, groups, allow_tf32, out);
  return plan_conv(kFinalize, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> finalize_configurations() { return configuration_names(kFinalize); }

// Memory that the launch writes, apart from everything else that it touches.
void check_apart(
    const char* name, const Tensor& written, const Tensor& x,
    std::initializer_list<std::pair<const char*, const std::optional<Tensor>>> others) {
  check_device(name, written, "x", x);
  const OutputMemory memory(written, name);
  memory.apart_from("x", x);
  for (const auto& [other_name, other] : others) memory.apart_from(other_name, other);
}

void conv_bn_stats_finalize_out(Tensor x, std::optional<Tensor> norm, Tensor weight,
                                std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps,
                                std::optional<Tensor> running_mean,
                                std::optional<Tensor> running_var, std::optional<Tensor> tracked,
                                std::optional<double> factor, Pair stride, Pair padding,
                                Pair dilation, int64_t groups, bool allow_tf32,
                                int64_t configuration, int64_t splits, Tensor out, Tensor stats,
                                Tensor rows, Tensor kept) {
  RfConvBnStats problem =
      stats_problem(x, norm, weight, stride, padding, dilation, groups, allow_tf32, out);
  const int64_t channels = weight.size(0);
  add_stats(problem, x, norm, weight, out, stats);
  if (out.numel() == 0) fail("out: expected elements, of which statistics could be made, got none");
  if (running_mean.has_value() != running_var.has_value()) {
    fail("running_var: expected together with running_mean or not at all, got one of them");
  }
  if (tracked && !running_mean) fail("tracked: expected None where running_mean is, got a tensor");
  if (running_mean && !factor && !tracked) {
    fail("factor: expected a number where there is no `tracked`, got None");
  }
  check_rows("rows", rows, kNormRows, channels);
  check_apart("rows", rows, x,
              {{"norm", norm},
               {"weight", weight},
               {"out", out},
               {"stats", stats},
               {"gamma", gamma},
               {"beta", beta}});
  RfStatsNorm& to = problem.finalized;
  to.norm = rows.mutable_data_ptr();
  to.gamma = values("gamma", gamma, {channels});
  to.beta = values("beta", beta, {channels});
  if (gamma) check_device("gamma", *gamma, "x", x);
  if (beta) check_device("beta", *beta, "x", x);
  to.eps = eps;
  if (running_mean) {
    to.running_mean = values("running_mean", running_mean, {channels});
    to.running_var = values("running_var", running_var, {channels});
    const ChannelVector old = values("kept", kept, {kKeptRows, channels});
    if (!old.is_double) fail("kept: expected float64, got float32");
    to.kept = old.data;
    const TrackedCount counted = tracked_count(tracked);
    to.tracked = counted.data;
    to.tracked_is_long = counted.is_long;
    to.cumulative = !factor;
    to.factor = factor.value_or(0);
    if (tracked) check_device("tracked", *tracked, "x", x);
    check_apart("running_mean", *running_mean, x,
                {{"running_var", running_var},
                 {"gamma", gamma},
                 {"beta", beta},
                 {"rows", rows},
                 {"stats", stats},
                 {"out", out}});
    check_apart("running_var", *running_var, x,
                {{"gamma", gamma}, {"beta", beta}, {"rows", rows}, {"stats", stats}, {"out", out}});
    check_apart("kept", kept, x,
                {{"running_mean", running_mean},
                 {"running_var", running_var},
                 {"rows", rows},
                 {"stats", stats},
                 {"out", out}});
  }
  run_conv(kFinalize, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_stats_finalize(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_stats_finalize_out(Tensor x, Tensor? norm, Tensor weight, Tensor? gamma, "
      "Tensor? beta, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? tracked, float? factor, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool allow_tf32, int configuration, int splits, Tensor(d!) out, "
      "Tensor(e!) stats, Tensor(f!) rows, Tensor(g!) kept) -> ()");
  library.def(
      "conv_bn_stats_finalize_plan(Tensor x, Tensor? norm, Tensor weight, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, "
      "int configuration, int splits) -> (int configuration, int splits, int workspace_bytes, "
      "float cycles, str why)");
  library.def("conv_bn_stats_finalize_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_stats_finalize_out", TORCH_BOX(&conv_bn_stats_finalize_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_stats_finalize_out", TORCH_BOX(&conv_bn_stats_finalize_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_stats_finalize_plan", TORCH_BOX(&finalize_plan));
  library.impl("conv_bn_stats_finalize_configurations", TORCH_BOX(&finalize_configurations));
}

}  // namespace resnet_fused
