// What the bindings of conv_bn_stats and of what goes on behind it share.
#pragma once

#include <optional>
#include <vector>

#include "../launch/conv_bn_stats.h"
#include "conv.h"

namespace resnet_fused {

using Pair = std::vector<int64_t>;

// Everything but the statistics and the devices, which no plan depends on.
RfConvBnStats stats_problem(const Tensor& x, const std::optional<Tensor>& norm,
                            const Tensor& weight, const Pair& stride, const Pair& padding,
                            const Pair& dilation, int64_t groups, bool allow_tf32,
                            const Tensor& out);

// Checks devices and memory of all operands and both results, of which `stats` enters the problem.
void add_stats(RfConvBnStats& problem, const Tensor& x, const std::optional<Tensor>& norm,
               const Tensor& weight, const Tensor& out, const Tensor& stats);

}  // namespace resnet_fused
