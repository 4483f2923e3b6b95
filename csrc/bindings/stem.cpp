// stem_out, stem_plan, stem_configurations: checks, then the plan, then the CUDA launch.
#include "../launch/stem.h"

#include <optional>
#include <string>
#include <vector>

#include "../device/stem_tile.h"
#include "conv.h"

namespace resnet_fused {
namespace {

using Pair = std::vector<int64_t>;

constexpr ConvKernel<RfStem> kStem = {"stem", rf_stem_configurations, rf_stem_configuration,
                                      rf_stem_plan, rf_stem_cuda};

StemImage image_of(const Tensor& x, const Tensor& weight) {
  const ScalarType type = x.scalar_type();
  if (type == weight.scalar_type()) return StemImage::kWeights;
  if (type == ScalarType::Byte) return StemImage::kBytes;
  if (type != ScalarType::Float) {
    fail("x: expected uint8, float32 or weight's dtype ", name_of(weight.scalar_type()), ", got ",
         name_of(type));
  }
  return StemImage::kFloat;
}

// Windows of size `kernel` over what is `size` and `padding` on both sides.
int64_t windows(const char* what, int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  if (size + 2 * padding < kernel) {
    fail(what, ": it spans ", kernel, " of ", size + 2 * padding, " padded pixels");
  }
  return (size + 2 * padding - kernel) / stride + 1;
}

// Everything but the per-channel vectors and the devices, which no plan depends on.
RfStem problem_of(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                  const Pair& pool_kernel, const Pair& pool_stride, const Pair& pool_padding,
                  const Tensor& out) {
  RfStem problem{};
  problem.dtype = static_cast<int32_t>(conv_type("weight", weight));
  check_four_dimensions("x", x, "[N, C, H, W]");
  check_four_dimensions("weight", weight, "[K, C, R, S]");
  check_four_dimensions("out", out, "[N, K, P, Q]");
  problem.image = static_cast<int32_t>(image_of(x, weight));
  problem.out_dtype = kFloat8E4M3;
  if (out.scalar_type() != ScalarType::Float8_e4m3fn) {
    check_dtype("out", out, "weight", weight);
    problem.out_dtype = problem.dtype;
  }
  problem.out_factor = 1;
  copy_pair("stride", stride, problem.stride);
  copy_pair("padding", padding, problem.padding);
  copy_pair("pool_kernel", pool_kernel, problem.pool_kernel);
  copy_pair("pool_stride", pool_stride, problem.pool_stride);
  copy_pair("pool_padding", pool_padding, problem.pool_padding);
  const int64_t dilation[2] = {1, 1};
  check_geometry(problem.stride, problem.padding, dilation, 1);
  check_geometry(problem.pool_kernel, problem.pool_padding, dilation, 1);
  check_geometry(problem.pool_stride, problem.pool_padding, dilation, 1);
  if (weight.size(1) != x.size(1)) {
    fail("weight: expected [K, ", x.size(1), ", R, S], got ", shape_of(weight));
  }
  std::vector<int64_t> shape{x.size(0), weight.size(0)};
  const std::vector<int64_t> conv =
      conv_output({x.size(2), x.size(3)}, weight, problem.stride, problem.padding, dilation);
  for (int d = 0; d < 2; ++d) {
    shape.push_back(windows("pool_kernel", conv[d], problem.pool_kernel[d], problem.pool_stride[d],
                            problem.pool_padding[d]));
  }
  check_shape("out", out, "the pooled shape", shape);
  problem.x = x.const_data_ptr();
  problem.weight = weight.const_data_ptr();
  problem.out = out.mutable_data_ptr();
  copy_sizes(x, problem.x_size);
  copy_sizes(weight, problem.weight_size);
  copy_strides(x, problem.x_stride);
  copy_strides(weight, problem.weight_stride);
  copy_strides(out, problem.out_stride);
  return problem;
}

PlanResult stem_plan(Tensor x, Tensor weight, Pair stride, Pair padding, Pair pool_kernel,
                     Pair pool_stride, Pair pool_padding, Tensor out, std::vector<int64_t> gpu,
                     int64_t configuration, int64_t splits) {
  const RfStem problem =
      problem_of(x, weight, stride, padding, pool_kernel, pool_stride, pool_padding, out);
  return plan_conv(kStem, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> stem_configurations() { return configuration_names(kStem); }

void stem_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, std::optional<Tensor> input_norm,
              Pair stride, Pair padding, Pair pool_kernel, Pair pool_stride, Pair pool_padding,
              double out_factor, bool dependent, bool follows, int64_t configuration,
              int64_t splits, Tensor out) {
  RfStem problem =
      problem_of(x, weight, stride, padding, pool_kernel, pool_stride, pool_padding, out);
  check_device("x", x, "weight", weight);
  check_device("out", out, "weight", weight);
  check_per_channel("scale", scale, "weight", weight, weight.size(0));
  check_per_channel("shift", shift, "weight", weight, weight.size(0));
  const OutputMemory memory(out);
  memory.apart_from("x", x);
  memory.apart_from("weight", weight);
  memory.apart_from("scale", scale);
  memory.apart_from("shift", shift);
  if (input_norm) {
    check_device("input_norm", *input_norm, "weight", weight);
    check_dtype("input_norm", *input_norm, "scale", scale);
    check_shape("input_norm", *input_norm, "a factor and a summand a channel", {2, x.size(1)});
    if (!input_norm->is_contiguous()) fail("input_norm: expected a contiguous tensor");
    memory.apart_from("input_norm", input_norm);
    problem.input_norm = input_norm->const_data_ptr();
  }
  problem.scale = scale.const_data_ptr();
  problem.shift = shift.const_data_ptr();
  problem.out_factor = static_cast<float>(out_factor);
  problem.flow = {dependent, follows};
  run_conv(kStem, problem, configuration, splits, out);
}

}  // namespace

void define_stem(torch::stable::detail::StableLibrary& library) {
  library.def(
      "stem_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? input_norm, "
      "int[2] stride, int[2] padding, int[2] pool_kernel, int[2] pool_stride, "
      "int[2] pool_padding, float out_factor, bool dependent, bool follows, int configuration, "
      "int splits, Tensor(a!) out) -> ()");
  library.def(
      "stem_plan(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] pool_kernel, "
      "int[2] pool_stride, int[2] pool_padding, Tensor out, int[] gpu, int configuration, "
      "int splits) -> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("stem_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("stem_out", TORCH_BOX(&stem_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("stem_out", TORCH_BOX(&stem_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("stem_plan", TORCH_BOX(&stem_plan));
  library.impl("stem_configurations", TORCH_BOX(&stem_configurations));
}

}  // namespace resnet_fused
