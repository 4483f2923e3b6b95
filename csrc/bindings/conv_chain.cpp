// conv_chain_out, conv_chain_plan, conv_chain_configurations: checks, then the plan, then the CUDA
// launch.
#include "conv_chain.h"

#include <string>
#include <utility>
#include <vector>

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvChain> kConvChain = {"conv_chain", rf_conv_chain_configurations,
                                                rf_conv_chain_configuration, rf_conv_chain_plan,
                                                rf_conv_chain_cuda};
constexpr int64_t kFar = int64_t{1} << 30;

// A convolution's weight of taps x taps, over `channels`; filters it has.
int64_t filters_of(const char* name, const Tensor& weight, const Tensor& x, int64_t channels,
                   int64_t taps = 1) {
  check_four_dimensions(name, weight, "[K, C, taps, taps]");
  check_dtype(name, weight, "x", x);
  if (weight.size(1) != channels || weight.size(2) != taps || weight.size(3) != taps) {
    fail(name, ": expected [K, ", channels, ", ", taps, ", ", taps, "], got ", shape_of(weight));
  }
  return weight.size(0);
}

const void* data_of(const Maybe& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

void check_option(const char* name, int64_t value, int64_t most) {
  if (value < 1 || value > most) fail(name, ": expected 1 to ", most, ", got ", value);
}

}  // namespace

RfConvChain chain_problem(const ChainTensors& tensors, int64_t projection_stride,
                          int64_t out_stride) {
  const auto& [x, weight, residual, projected, projection_weight, next_weight, front_weight,
               following, out] = tensors;
  RfConvChain problem{};
  check_four_dimensions("x", x, "[N, K, H, W]");
  check_option("projection_stride", projection_stride, kFar);
  check_option("out_stride", out_stride, 2);
  int64_t inner = x.size(1);
  if (front_weight) {
    inner = problem.front_channels = filters_of("front_weight", *front_weight, x, inner, 3);
    copy_strides(*front_weight, problem.front_weight_stride);
  }
  problem.channels = filters_of("weight", weight, x, inner);
  const std::vector<int64_t> shape{x.size(0), problem.channels, x.size(2), x.size(3)};
  if (residual) {
    check_dtype("residual", *residual, "x", x);
    check_shape("residual", *residual, "the output's shape", shape);
    copy_strides(*residual, problem.residual_stride);
  }
  if (projected.has_value() == residual.has_value()) {
    fail("residual, projected: expected one of them, got ", residual ? "both" : "neither");
  }
  if (projected.has_value() != projection_weight.has_value()) {
    fail("projected, projection_weight: expected both or neither");
  }
  if (projected) {
    check_four_dimensions("projected", *projected, "[N, D, P, Q]");
    check_dtype("projected", *projected, "x", x);
    problem.projects = 1;
    problem.projected_channels = projected->size(1);
    const int64_t filters =
        filters_of("projection_weight", *projection_weight, x, problem.projected_channels);
    const auto along = [&](int d) {
      return (projected->size(d) + projection_stride - 1) / projection_stride;
    };
    const std::vector<int64_t> made{projected->size(0), filters, along(2), along(3)};
    if (made != shape) {
      fail("projected: expected what makes ", shape_of(shape), ", got what makes ", shape_of(made));
    }
    copy_strides(*projected, problem.projected_stride);
    copy_strides(*projection_weight, problem.projection_weight_stride);
  }
  if (next_weight) {
    problem.next_channels = filters_of("next_weight", *next_weight, x, problem.channels);
    copy_strides(*next_weight, problem.next_weight_stride);
  }
  const auto thinned = [&](int64_t size) { return (size + out_stride - 1) / out_stride; };
  check_dtype("out", out, "x", x);
  check_shape("out", out, "the stored pixels",
              {shape[0], shape[1], thinned(shape[2]), thinned(shape[3])});
  check_dtype("following", following, "x", x);
  check_shape("following", following, "next's shape",
              {shape[0], problem.next_channels, shape[2], shape[3]});
  problem.x = x.const_data_ptr();
  problem.weight = weight.const_data_ptr();
  problem.residual = data_of(residual);
  problem.projected = data_of(projected);
  problem.projection_weight = data_of(projection_weight);
  problem.next_weight = data_of(next_weight);
  problem.front_weight = data_of(front_weight);
  problem.out = out.mutable_data_ptr();
  problem.following = following.mutable_data_ptr();
  problem.out_stride = out_stride;
  problem.projection_stride = projection_stride;
  copy_sizes(x, problem.x_size);
  copy_strides(x, problem.x_stride);
  copy_strides(weight, problem.weight_stride);
  copy_strides(out, problem.out_strides);
  copy_strides(following, problem.following_stride);
  return problem;
}

namespace {

// Scale and shift of a convolution: with its weight, or not at all.
void check_vectors(const char* scale_name, const Maybe& scale, const char* shift_name,
                   const Maybe& shift, const char* weight_name, const Maybe& weight,
                   const Tensor& x) {
  if (scale.has_value() != weight.has_value() || shift.has_value() != weight.has_value()) {
    fail(scale_name, ", ", shift_name, ": expected with ", weight_name, ", and not without");
  }
  if (!weight) return;
  check_device(weight_name, *weight, "x", x);
  check_per_channel(scale_name, *scale, "x", x, weight->size(0));
  check_per_channel(shift_name, *shift, "x", x, weight->size(0));
}

}  // namespace

void add_vectors(RfConvChain& problem, const ChainTensors& tensors, const ChainVectors& vectors,
                 const RfFlow& flow) {
  const auto& [x, weight, residual, projected, projection_weight, next_weight, front_weight,
               following, out] = tensors;
  const auto& [scale, shift, projection_scale, projection_shift, next_scale, next_shift,
               front_scale, front_shift] = vectors;
  check_vectors("scale", scale, "shift", shift, "weight", weight, x);
  check_vectors("projection_scale", projection_scale, "projection_shift", projection_shift,
                "projection_weight", projection_weight, x);
  check_vectors("next_scale", next_scale, "next_shift", next_shift, "next_weight", next_weight, x);
  check_vectors("front_scale", front_scale, "front_shift", front_shift, "front_weight",
                front_weight, x);
  if (residual) check_device("residual", *residual, "x", x);
  if (projected) check_device("projected", *projected, "x", x);
  check_device("out", out, "x", x);
  check_device("following", following, "x", x);
  const OutputMemory memory(out);
  const OutputMemory last(following);
  memory.apart_from("following", following);
  const std::pair<const char*, const Maybe> inputs[] = {{"x", x},
                                                        {"weight", weight},
                                                        {"scale", scale},
                                                        {"shift", shift},
                                                        {"residual", residual},
                                                        {"projected", projected},
                                                        {"projection_weight", projection_weight},
                                                        {"projection_scale", projection_scale},
                                                        {"projection_shift", projection_shift},
                                                        {"next_weight", next_weight},
                                                        {"next_scale", next_scale},
                                                        {"next_shift", next_shift},
                                                        {"front_weight", front_weight},
                                                        {"front_scale", front_scale},
                                                        {"front_shift", front_shift}};
  for (const auto& [name, input] : inputs) {
    memory.apart_from(name, input);
    last.apart_from(name, input);
  }
  problem.scale = scale.const_data_ptr();
  problem.shift = shift.const_data_ptr();
  problem.projection_scale = data_of(projection_scale);
  problem.projection_shift = data_of(projection_shift);
  problem.next_scale = data_of(next_scale);
  problem.next_shift = data_of(next_shift);
  problem.front_scale = data_of(front_scale);
  problem.front_shift = data_of(front_shift);
  problem.flow = flow;
}

namespace {

RfConvChain problem_of(const ChainTensors& tensors, int64_t projection_stride, int64_t out_stride,
                       bool reverse) {
  const auto dtype = static_cast<int32_t>(conv_type("x", tensors.x));
  RfConvChain problem = chain_problem(tensors, projection_stride, out_stride);
  problem.dtype = dtype;
  problem.reverse = reverse;
  return problem;
}

PlanResult conv_chain_plan(Tensor x, Tensor weight, Maybe residual, Maybe projected,
                           Maybe projection_weight, Maybe next_weight, Maybe front_weight,
                           Tensor following, int64_t projection_stride, int64_t out_stride,
                           bool reverse, Tensor out, std::vector<int64_t> gpu,
                           int64_t configuration, int64_t splits) {
  const RfConvChain problem = problem_of({x, weight, residual, projected, projection_weight,
                                          next_weight, front_weight, following, out},
                                         projection_stride, out_stride, reverse);
  return plan_conv(kConvChain, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_chain_configurations() { return configuration_names(kConvChain); }

void conv_chain_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Maybe residual,
                    Maybe projected, Maybe projection_weight, Maybe projection_scale,
                    Maybe projection_shift, Maybe next_weight, Maybe next_scale, Maybe next_shift,
                    Maybe front_weight, Maybe front_scale, Maybe front_shift,
                    int64_t projection_stride, int64_t out_stride, bool reverse, bool dependent,
                    bool follows, int64_t configuration, int64_t splits, Tensor out,
                    Tensor following) {
  const ChainTensors tensors{x,           weight,       residual,  projected, projection_weight,
                             next_weight, front_weight, following, out};
  RfConvChain problem = problem_of(tensors, projection_stride, out_stride, reverse);
  add_vectors(problem, tensors,
              {scale, shift, projection_scale, projection_shift, next_scale, next_shift,
               front_scale, front_shift},
              {dependent, follows});
  run_conv(kConvChain, problem, configuration, splits, out);
}

}  // namespace

void define_conv_chain(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_chain_out(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor? projected, Tensor? projection_weight, Tensor? projection_scale, "
      "Tensor? projection_shift, Tensor? next_weight, Tensor? next_scale, Tensor? next_shift, "
      "Tensor? front_weight, Tensor? front_scale, Tensor? front_shift, "
      "int projection_stride, int out_stride, bool reverse, bool dependent, bool follows, "
      "int configuration, int splits, "
      "Tensor(a!) out, Tensor(b!) following) -> ()");
  library.def(
      "conv_chain_plan(Tensor x, Tensor weight, Tensor? residual, Tensor? projected, "
      "Tensor? projection_weight, Tensor? next_weight, Tensor? front_weight, Tensor following, "
      "int projection_stride, int out_stride, bool reverse, Tensor out, int[] gpu, int "
      "configuration, int splits) "
      "-> (int configuration, int splits, int workspace_bytes, float cycles, str why)");
  library.def("conv_chain_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_chain_out", TORCH_BOX(&conv_chain_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_chain_out", TORCH_BOX(&conv_chain_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_chain_plan", TORCH_BOX(&conv_chain_plan));
  library.impl("conv_chain_configurations", TORCH_BOX(&conv_chain_configurations));
}

}  // namespace resnet_fused
