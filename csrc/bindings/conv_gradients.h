// What the bindings of a convolution's gradients share: its checked problem.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../launch/conv_gradients.h"
#include "conv.h"

namespace resnet_fused {

// A tensor, and what messages call it.
struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// Sizes, strides, pointers and geometry of a gradient, checked but for devices and weight's dtype;
// of x and weight one is read and one is written. What per-channel values there are is left open.
RfConvGradient gradient_problem(const NamedTensor& dz, const std::optional<Tensor>& y,
                                const NamedTensor& x, const NamedTensor& weight,
                                const std::vector<int64_t>& stride,
                                const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, int64_t groups,
                                bool allow_tf32);

}  // namespace resnet_fused
