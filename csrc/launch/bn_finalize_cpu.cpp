// A handful of operations a channel: for a small batch, PyTorch's own calls cost more than they do.
#include <cmath>

#include "bn_finalize.h"

namespace resnet_fused {

void bn_finalize(ChannelVector stats, ChannelVector gamma, ChannelVector beta, int64_t channels,
                 double elements, double eps, ChannelVector norm) {
  for (int64_t k = 0; k < channels; ++k) {
    const double mean = stats.get(k);
    const double invstd = 1.0 / std::sqrt(stats.get(channels + k) / elements + eps);
    norm.set(k, gamma.data ? gamma.get(k) * invstd : invstd);
    // Of the rounded scale, whose error then cancels in scale * (y - mean).
    const double shift = -mean * norm.get(k);
    norm.set(channels + k, beta.data ? shift + beta.get(k) : shift);
    norm.set(2 * channels + k, mean);
    norm.set(3 * channels + k, invstd);
  }
}

void bn_update_stats(ChannelVector stats, int64_t channels, double elements, double factor,
                     ChannelVector running_mean, ChannelVector running_var) {
  for (int64_t k = 0; k < channels; ++k) {
    const double variance = stats.get(channels + k) / (elements - 1);
    running_mean.set(k, (1 - factor) * running_mean.get(k) + factor * stats.get(k));
    running_var.set(k, (1 - factor) * running_var.get(k) + factor * variance);
  }
}

void bn_backward_finalize(ChannelVector sums, ChannelVector all_sums, ChannelVector norm,
                          int64_t channels, double elements, int64_t row, bool frozen,
                          ChannelVector coefficients, ChannelVector dgamma, ChannelVector dbeta) {
  for (int64_t k = 0; k < channels; ++k) {
    const double scale = norm.get(k), mean = norm.get(2 * channels + k);
    const double invstd = norm.get(3 * channels + k);
    coefficients.set(k, scale);
    if (frozen) {
      coefficients.set(channels + k, 0);
      coefficients.set(2 * channels + k, 0);
    } else {
      coefficients.set(channels + k,
                       -scale * invstd * (invstd * all_sums.get(row * channels + k)) / elements);
      // Of the rounded B, whose error then cancels in B (y - mean).
      const double b = coefficients.get(channels + k);
      coefficients.set(2 * channels + k, -scale * all_sums.get(k) / elements - b * mean);
    }
    dgamma.set(k, invstd * sums.get(row * channels + k));
    dbeta.set(k, sums.get(k));
  }
}

}  // namespace resnet_fused
