// head_out, head_plan, head_configurations: checks, then the plan, then the CUDA launch.
#include "../launch/head.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfHead> kHead = {"head", rf_head_configurations, rf_head_configuration,
                                      rf_head_plan, rf_head_cuda};

// Everything but the bias and the devices, which no plan depends on.
RfHead problem_of(const Tensor& x, const Tensor& weight, const Tensor& out) {
  RfHead problem{};
  problem.dtype = static_cast<int32_t>(conv_type("x", x));
  check_four_dimensions("x", x, "[N, C, H, W]");
  check_dtype("weight", weight, "x", x);
  check_dtype("out", out, "x", x);
  if (weight.dim() != 2 || weight.size(1) != x.size(1)) {
    fail("weight: expected [classes, ", x.size(1), "], got ", shape_of(weight));
  }
  check_shape("out", out, "images and classes", {x.size(0), weight.size(0)});
  if (!out.is_contiguous()) fail("out: expected a contiguous tensor");
  problem.x = x.const_data_ptr();
  problem.weight = weight.const_data_ptr();
  problem.out = out.mutable_data_ptr();
  problem.classes = weight.size(0);
  copy_sizes(x, problem.x_size);
  copy_strides(x, problem.x_stride);
  for (int d = 0; d < 2; ++d) problem.weight_stride[d] = weight.stride(d);
  return problem;
}

PlanResult head_plan(Tensor x, Tensor weight, Tensor out, std::vector<int64_t> gpu,
                     int64_t configuration, int64_t splits) {
  return plan_conv(kHead, problem_of(x, weight, out), gpu_of(gpu), configuration, splits);
}

std::vector<std::string> head_configurations() { return configuration_names(kHead); }

void head_out(Tensor x, Tensor weight, std::optional<Tensor> bias, bool dependent, bool follows,
              int64_t configuration, int64_t splits, Tensor out) {
  RfHead problem = problem_of(x, weight, out);
  check_device("weight", weight, "x", x);
  check_device("out", out, "x", x);
  const OutputMemory memory(out);
  memory.apart_from("x", x);
  memory.apart_from("weight", weight);
  if (bias) {
    check_device("bias", *bias, "x", x);
    check_dtype("bias", *bias, "x", x);
    check_shape("bias", *bias, "one value a class", {weight.size(0)});
    if (!bias->is_contiguous()) fail("bias: expected a contiguous tensor");
    memory.apart_from("bias", bias);
    problem.bias = bias->const_data_ptr();
  }
  problem.flow = {dependent, follows};
  run_conv(kHead, problem, configuration, splits, out);
}

}  // namespace

void define_head(torch::stable::detail::StableLibrary& library) {
  library.def(
      "head_out(Tensor x, Tensor weight, Tensor? bias, bool dependent, bool follows, "
      "int configuration, int splits, Tensor(a!) out) -> ()");
  library.def(
      "head_plan(Tensor x, Tensor weight, Tensor out, int[] gpu, int configuration, int splits) "
      "-> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("head_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("head_out", TORCH_BOX(&head_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("head_out", TORCH_BOX(&head_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("head_plan", TORCH_BOX(&head_plan));
  library.impl("head_configurations", TORCH_BOX(&head_configurations));
}

}  // namespace resnet_fused
