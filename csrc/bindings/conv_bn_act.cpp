// conv_bn_act_out, conv_bn_act_plan, conv_bn_act_configurations: checks, then the plan, then the
// CUDA launch.
#include "../launch/conv_bn_act.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvBnAct> kConvBnAct = {"conv_bn_act", rf_conv_bn_act_configurations,
                                                rf_conv_bn_act_configuration, rf_conv_bn_act_plan,
                                                rf_conv_bn_act_cuda};

// Everything but the per-channel vectors and the devices, which no plan depends on.
RfConvBnAct problem_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                       const Pair& stride, const Pair& padding, const Pair& dilation,
                       int64_t groups, bool allow_tf32, const Tensor& out) {
  const DataType dtype = conv_type("x", x);
  check_dtype("weight", weight, "x", x);
  check_dtype("out", out, "x", x);
  if (residual) check_dtype("residual", *residual, "x", x);
  RfConvBnAct problem = conv_problem(x, weight, residual, stride, padding, dilation, groups, out);
  problem.dtype = static_cast<int32_t>(dtype);
  problem.allow_tf32 = allow_tf32;
  return problem;
}

PlanResult conv_bn_act_plan(Tensor x, Tensor weight, std::optional<Tensor> residual, Pair stride,
                            Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                            Tensor out, std::vector<int64_t> gpu, int64_t configuration,
                            int64_t splits) {
  const RfConvBnAct problem =
      problem_of(x, weight, residual, stride, padding, dilation, groups, allow_tf32, out);
  return plan_conv(kConvBnAct, problem, gpu_of(gpu), configuration, splits);
}

void check_arrivals(const Tensor& arrivals, const Tensor& x) {
  check_device("arrivals", arrivals, "x", x);
  if (arrivals.scalar_type() != ScalarType::Int || !arrivals.is_contiguous()) {
    fail("arrivals: expected contiguous int32 zeros, got ", name_of(arrivals.scalar_type()), " of ",
         shape_of(arrivals));
  }
}

std::vector<std::string> conv_bn_act_configurations() { return configuration_names(kConvBnAct); }

void conv_bn_act_out(Tensor x, Tensor weight, Tensor scale, Tensor shift,
                     std::optional<Tensor> residual, Pair stride, Pair padding, Pair dilation,
                     int64_t groups, bool relu, bool allow_tf32, bool reverse, bool dependent,
                     bool follows, std::optional<Tensor> arrivals, int64_t configuration,
                     int64_t splits, Tensor out) {
  RfConvBnAct problem =
      problem_of(x, weight, residual, stride, padding, dilation, groups, allow_tf32, out);
  const OutputMemory memory =
      add_epilogue(problem, x, weight, scale, shift, residual, relu, {dependent, follows}, out);
  problem.reverse = reverse;
  if (arrivals) {
    check_arrivals(*arrivals, x);
    memory.apart_from("arrivals", arrivals);
    problem.arrivals = static_cast<uint32_t*>(arrivals->mutable_data_ptr());
    problem.arrivals_count = arrivals->numel();
  }
  run_conv(kConvBnAct, problem, configuration, splits, out);
}

// The six numbers of a plan, as the driver gives them for a device, which is the current one.
std::vector<int64_t> conv_gpu(int64_t device) {
  const RfGpu found = gpu_of(static_cast<int>(device));
  return {found.multiprocessors, found.shared_per_block, found.shared_per_multiprocessor,
          found.capability,      found.clusters_of_4,    found.clusters_of_8};
}

}  // namespace

void define_conv_bn_act(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_act_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, bool allow_tf32, "
      "bool reverse, bool dependent, bool follows, Tensor(b!)? arrivals, int configuration, "
      "int splits, Tensor(a!) out) -> ()");
  library.def(
      "conv_bn_act_plan(Tensor x, Tensor weight, Tensor? residual, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool allow_tf32, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_bn_act_configurations() -> str[]");
  library.def("conv_gpu(int device) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_act_out", TORCH_BOX(&conv_bn_act_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_act_out", TORCH_BOX(&conv_bn_act_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_act_plan", TORCH_BOX(&conv_bn_act_plan));
  library.impl("conv_bn_act_configurations", TORCH_BOX(&conv_bn_act_configurations));
  library.impl("conv_gpu", TORCH_BOX(&conv_gpu));
}

}  // namespace resnet_fused
