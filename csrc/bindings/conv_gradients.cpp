// conv_dgrad_out, conv_wgrad_out, their plans and configurations: checks, then the plan, then the
// CUDA launch.
#include "../launch/conv_gradients.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"
#include "conv_gradients.h"

namespace resnet_fused {

RfConvGradient gradient_problem(const NamedTensor& dz, const std::optional<Tensor>& y,
                                const NamedTensor& x, const NamedTensor& weight,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                bool allow_tf32) {
  const auto& [name, dy] = dz;
  RfConvGradient problem{};
  problem.dtype = static_cast<int32_t>(conv_type(name, dy));
  check_four_dimensions(name, dy, "[N, K, P, Q]");
  check_four_dimensions(x.name, x.tensor, "[N, C, H, W]");
  check_four_dimensions(weight.name, weight.tensor, "[K, C/groups, R, S]");
  check_dtype(x.name, x.tensor, name, dy);
  copy_pair("stride", stride, problem.stride);
  copy_pair("padding", padding, problem.padding);
  copy_pair("dilation", dilation, problem.dilation);
  check_geometry(problem.stride, problem.padding, problem.dilation, groups);
  if (x.tensor.size(1) % groups != 0 || weight.tensor.size(1) != x.tensor.size(1) / groups ||
      weight.tensor.size(0) % groups != 0) {
    fail(weight.name, ": expected [K, ", x.tensor.size(1),
         "/groups, R, S] with K a multiple of groups = ", groups, ", got ",
         shape_of(weight.tensor));
  }
  const std::vector<int64_t> pixels =
      conv_output({x.tensor.size(2), x.tensor.size(3)}, weight.tensor, problem.stride,
                  problem.padding, problem.dilation);
  const std::vector<int64_t> shape{x.tensor.size(0), weight.tensor.size(0), pixels[0], pixels[1]};
  check_shape(name, dy, "the convolution's shape", shape);
  if (y) {
    check_dtype("y", *y, name, dy);
    check_shape("y", *y, (std::string(name) + "'s shape").c_str(), shape);
    copy_strides(*y, problem.y_stride);
  }
  problem.dy = dy.const_data_ptr();
  problem.y = y ? y->const_data_ptr() : nullptr;
  // The launch writes one of them and reads the other one.
  problem.x = const_cast<void*>(x.tensor.const_data_ptr());
  problem.weight = const_cast<void*>(weight.tensor.const_data_ptr());
  problem.allow_tf32 = allow_tf32;
  problem.groups = static_cast<int32_t>(groups);
  copy_sizes(x.tensor, problem.x_size);
  copy_sizes(weight.tensor, problem.weight_size);
  copy_strides(dy, problem.dy_stride);
  copy_strides(x.tensor, problem.x_stride);
  copy_strides(weight.tensor, problem.weight_stride);
  return problem;
}

namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfConvGradient> kConvDgrad = {"conv_dgrad", rf_conv_dgrad_configurations,
                                                   rf_conv_dgrad_configuration, rf_conv_dgrad_plan,
                                                   rf_conv_dgrad_cuda};
constexpr ConvKernel<RfConvGradient> kConvWgrad = {"conv_wgrad", rf_conv_wgrad_configurations,
                                                   rf_conv_wgrad_configuration, rf_conv_wgrad_plan,
                                                   rf_conv_wgrad_cuda};

void run(const ConvKernel<RfConvGradient>& kernel, RfConvGradient& problem, const Tensor& dy,
         const std::optional<Tensor>& y, const NamedTensor& read, const Tensor& scale,
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
  check_dtype("weight", weight, "dy", dy);
  const RfConvGradient problem = gradient_problem({"dy", dy}, y, {"out", out}, {"weight", weight},
                                                  stride, padding, dilation, groups, allow_tf32);
  return plan_conv(kConvDgrad, problem, gpu_of(gpu), configuration, splits);
}

PlanResult conv_wgrad_plan(Tensor dy, std::optional<Tensor> y, Tensor x, Pair stride, Pair padding,
                           Pair dilation, int64_t groups, bool allow_tf32, Tensor out,
                           std::vector<int64_t> gpu, int64_t configuration, int64_t splits) {
  check_dtype("out", out, "dy", dy);
  const RfConvGradient problem = gradient_problem({"dy", dy}, y, {"x", x}, {"out", out}, stride,
                                                  padding, dilation, groups, allow_tf32);
  return plan_conv(kConvWgrad, problem, gpu_of(gpu), configuration, splits);
}

void conv_dgrad_out(Tensor dy, std::optional<Tensor> y, Tensor weight, Tensor scale, Pair stride,
                    Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                    int64_t configuration, int64_t splits, Tensor out) {
  check_dtype("weight", weight, "dy", dy);
  RfConvGradient problem = gradient_problem({"dy", dy}, y, {"out", out}, {"weight", weight}, stride,
                                            padding, dilation, groups, allow_tf32);
  run(kConvDgrad, problem, dy, y, {"weight", weight}, scale, configuration, splits, out);
}

void conv_wgrad_out(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor scale, Pair stride,
                    Pair padding, Pair dilation, int64_t groups, bool allow_tf32,
                    int64_t configuration, int64_t splits, Tensor out) {
  check_dtype("out", out, "dy", dy);
  RfConvGradient problem = gradient_problem({"dy", dy}, y, {"x", x}, {"out", out}, stride, padding,
                                            dilation, groups, allow_tf32);
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
