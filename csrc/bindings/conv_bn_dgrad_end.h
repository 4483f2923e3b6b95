// What the bindings of conv_bn_dgrad_end and conv_bn_grad1x1_end share: operands and their checked
// problem.
#pragma once

#include "../launch/conv_bn_dgrad_end.h"

#include <cstdint>
#include <optional>
#include <vector>

#include "conv_bn_dgrad.h"

namespace resnet_fused {

using Pair = std::vector<int64_t>;

// What is read beside conv_bn_dgrad's operands.
struct EndOperands {
  const Tensor& out;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& residual_norm;
};

// Everything but the sums and the devices, which no plan depends on.
RfConvBnDgradEnd bn_dgrad_end_problem(const BnDgradOperands& image, const EndOperands& end,
                                      int64_t addend_stride, const Pair& stride,
                                      const Pair& padding, const Pair& dilation, int64_t groups,
                                      bool allow_tf32, const Tensor& dx);

}  // namespace resnet_fused
