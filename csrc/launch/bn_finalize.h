// The C interface of BatchNorm's arithmetic on per-channel values, for the CPU: in double, value by
// value. C is float, or double beside float64 activations.
#pragma once

#include <cstdint>

#include "../device/channel_vector.h"

namespace resnet_fused {

// [2, K] mean and M2 of `elements` values a channel -> [4, K] scale, shift, mean, invstd.
void bn_finalize(ChannelVector stats, ChannelVector gamma, ChannelVector beta, int64_t channels,
                 double elements, double eps, ChannelVector norm);

// running = (1 - factor) running + factor * (mean, M2 / (elements - 1)).
void bn_update_stats(ChannelVector stats, int64_t channels, double elements, double factor,
                     ChannelVector running_mean, ChannelVector running_var);

// Row `row` of the sums of all ranks -> [3, K] A, B, C; of this rank -> gamma's gradient.
void bn_backward_finalize(ChannelVector sums, ChannelVector all_sums, ChannelVector norm,
                          int64_t channels, double elements, int64_t row, bool frozen,
                          ChannelVector coefficients, ChannelVector dgamma, ChannelVector dbeta);

}  // namespace resnet_fused
