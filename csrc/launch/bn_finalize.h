// The C interface of BatchNorm's arithmetic on per-channel values, for the CPU: in double, value by
// value. C is float, or double beside float64 activations.
#pragma once

#include <cstdint>

namespace resnet_fused {

// A vector of float or double; null: absent.
struct ChannelVector {
  void* data;
  bool is_double;

  double get(int64_t k) const {
    return is_double ? static_cast<const double*>(data)[k]
                     : static_cast<double>(static_cast<const float*>(data)[k]);
  }
  void set(int64_t k, double value) const {
    if (is_double) {
      static_cast<double*>(data)[k] = value;
    } else {
      static_cast<float*>(data)[k] = static_cast<float>(value);
    }
  }
};

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
