// The problem of a convolution's gradient, of tensors: what the bindings of all of them share.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../launch/conv_gradients.h"
#include "conv.h"

namespace resnet_fused {

// A tensor, and what the op's schema calls it.
struct Operand {
  const char* name;
  const Tensor& tensor;
};

// Sizes, strides, pointers and geometry, checked but for the dtype of `weight` and for devices;
// scale is left at zero. gradient: of the convolution's result. x, weight: the convolution's
// operands, or their gradient.
RfConvGradient gradient_problem(const Operand& gradient, const std::optional<Tensor>& y,
                                const Operand& x, const Operand& weight,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                bool allow_tf32);

}  // namespace resnet_fused
