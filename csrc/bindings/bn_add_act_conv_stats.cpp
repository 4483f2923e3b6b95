// bn_add_act_conv_stats_out, bn_add_act_conv_stats_plan, bn_add_act_conv_stats_configurations:
// checks, then the plan, then the CUDA launch.
#include "../launch/bn_add_act_conv_stats.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfBnAddActConvStats> kBnAddActConvStats = {
    "bn_add_act_conv_stats", rf_bn_add_act_conv_stats_configurations,
    rf_bn_add_act_conv_stats_configuration, rf_bn_add_act_conv_stats_plan,
    rf_bn_add_act_conv_stats_cuda};
constexpr int64_t kNormRows = 4;   // scale, shift, mean, invstd
constexpr int64_t kStatsRows = 2;  // mean, M2

// What is read, in the order of the schema.
struct Operands {
  const Tensor& y;
  const Tensor& norm;
  const Tensor& residual;
  const std::optional<Tensor>& residual_norm;
  const Tensor& weight;

  // visit(name, tensor) for each that there is, but y.
  template <class Visit>
  void others(const Visit& visit) const {
    visit("norm", norm);
    visit("residual", residual);
    if (residual_norm) visit("residual_norm", *residual_norm);
    visit("weight", weight);
  }
};

// Everything but the statistics and the devices, which no plan depends on.
RfBnAddActConvStats problem_of(const Operands& given, bool allow_tf32, const Tensor& out,
                               const Tensor& z) {
  const Tensor& y = given.y;
  const DataType dtype = conv_type("y", y);
  check_dtype("residual", given.residual, "y", y);
  check_dtype("weight", given.weight, "y", y);
  check_dtype("out", out, "y", y);
  check_dtype("z", z, "y", y);
  RfBnAddActConvStats problem{};
  RfConvBnAct& conv = problem.stats.conv;
  conv = conv_problem(y, given.weight, std::nullopt, {1, 1}, {0, 0}, {1, 1}, 1, z);
  conv.dtype = static_cast<int32_t>(dtype);
  conv.allow_tf32 = allow_tf32;
  const std::vector<int64_t> shape(y.sizes().begin(), y.sizes().end());
  check_shape("residual", given.residual, "y's shape", shape);
  check_shape("out", out, "y's shape", shape);
  check_rows("norm", given.norm, kNormRows, y.size(1));
  problem.stats.norm = given.norm.const_data_ptr();
  problem.stats.normed = 1;
  if (given.residual_norm) {
    check_rows("residual_norm", *given.residual_norm, kNormRows, y.size(1));
    problem.residual_norm = given.residual_norm->const_data_ptr();
    problem.projected = 1;
  }
  problem.residual = given.residual.const_data_ptr();
  copy_strides(given.residual, problem.residual_stride);
  problem.out = out.mutable_data_ptr();
  copy_strides(out, problem.out_stride);
  return problem;
}

PlanResult bn_add_act_conv_stats_plan(Tensor y, Tensor norm, Tensor residual,
                                      std::optional<Tensor> residual_norm, Tensor weight,
                                      bool allow_tf32, Tensor out, Tensor z,
                                      std::vector<int64_t> gpu, int64_t configuration,
                                      int64_t splits) {
  const RfBnAddActConvStats problem =
      problem_of({y, norm, residual, residual_norm, weight}, allow_tf32, out, z);
  return plan_conv(kBnAddActConvStats, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> bn_add_act_conv_stats_configurations() {
  return configuration_names(kBnAddActConvStats);
}

void bn_add_act_conv_stats_out(Tensor y, Tensor norm, Tensor residual,
                               std::optional<Tensor> residual_norm, Tensor weight, bool allow_tf32,
                               Tensor out, int64_t configuration, int64_t splits, Tensor z,
                               Tensor stats) {
  const Operands given{y, norm, residual, residual_norm, weight};
  RfBnAddActConvStats problem = problem_of(given, allow_tf32, out, z);
  check_rows("stats", stats, kStatsRows, weight.size(0));
  given.others([&](const char* name, const Tensor& one) { check_device(name, one, "y", y); });
  const auto written = [&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, "y", y);
    const OutputMemory memory(tensor, name);
    memory.apart_from("y", y);
    given.others([&](const char* read, const Tensor& other) { memory.apart_from(read, other); });
    return memory;
  };
  const OutputMemory memory = written("out", out);
  memory.apart_from("z", z);
  memory.apart_from("stats", stats);
  written("z", z).apart_from("stats", stats);
  written("stats", stats);
  if (z.is_cuda() && out.numel() > 0 && z.numel() == 0) {
    fail("weight: it has no filters, and there is no product to make out beside");
  }
  problem.stats.stats = stats.mutable_data_ptr();
  if (z.is_cuda() && z.numel() == 0) torch::stable::zero_(stats);
  run_conv(kBnAddActConvStats, problem, configuration, splits, z);
}

}  // namespace

void define_bn_add_act_conv_stats(torch::stable::detail::StableLibrary& library) {
  library.def(
      "bn_add_act_conv_stats_out(Tensor y, Tensor norm, Tensor residual, Tensor? residual_norm, "
      "Tensor weight, bool allow_tf32, Tensor(a!) out, int configuration, int splits, "
      "Tensor(b!) z, Tensor(c!) stats) -> ()");
  library.def(
      "bn_add_act_conv_stats_plan(Tensor y, Tensor norm, Tensor residual, Tensor? residual_norm, "
      "Tensor weight, bool allow_tf32, Tensor out, Tensor z, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("bn_add_act_conv_stats_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("bn_add_act_conv_stats_out", TORCH_BOX(&bn_add_act_conv_stats_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("bn_add_act_conv_stats_out", TORCH_BOX(&bn_add_act_conv_stats_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("bn_add_act_conv_stats_plan", TORCH_BOX(&bn_add_act_conv_stats_plan));
  library.impl("bn_add_act_conv_stats_configurations",
               TORCH_BOX(&bn_add_act_conv_stats_configurations));
}

}  // namespace resnet_fused
