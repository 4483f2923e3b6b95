#include "conv_gradient_problem.h"

namespace resnet_fused {

RfConvGradient gradient_problem(const Operand& gradient, const std::optional<Tensor>& y,
                                const Operand& x, const Operand& weight,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                bool allow_tf32) {
  const Tensor& dy = gradient.tensor;
  RfConvGradient problem{};
  problem.dtype = static_cast<int32_t>(conv_type(gradient.name, dy));
  check_four_dimensions(gradient.name, dy, "[N, K, P, Q]");
  check_four_dimensions(x.name, x.tensor, "[N, C, H, W]");
  check_four_dimensions(weight.name, weight.tensor, "[K, C/groups, R, S]");
  check_dtype(x.name, x.tensor, gradient.name, dy);
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
  check_shape(gradient.name, dy, "the convolution's shape", shape);
  if (y) {
    check_dtype("y", *y, gradient.name, dy);
    check_shape("y", *y, (gradient.name + std::string("'s shape")).c_str(), shape);
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

}  // namespace resnet_fused
