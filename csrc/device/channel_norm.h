// BatchNorm's arithmetic on one channel's statistics, in double: by bn_finalize and
// bn_update_stats, and by the blocks that end a convolution's launch, to the same bits. So
// multiply-adds are spelled out: which ones a compiler fuses may hang on what stands around them.
#pragma once

#include <cmath>

#include "../ptx/memory.h"
#include "channel_value.h"

namespace resnet_fused {

// Scale, shift, mean and invstd of channel k into norm [4, channels]. gamma, beta: absent 1 and 0.
RF_DEVICE void finalize_channel(int64_t k, int64_t channels, double mean, double m2,
                                double elements, double eps, const ChannelVector& gamma,
                                const ChannelVector& beta, const ChannelVector& norm) {
  const double variance = m2 / elements;
  const double invstd = 1.0 / sqrt(variance + eps);
  double scale = invstd;
  if (gamma.data != nullptr) scale *= load_value(gamma, k);
  // Of the rounded scale, whose error then cancels in scale * (y - mean).
  const double stored = as_stored(norm, scale);
  double shift = -mean * stored;
  if (beta.data != nullptr) shift = __builtin_fma(-mean, stored, load_value(beta, k));
  store_value(norm, k, scale);
  store_value(norm, channels + k, shift);
  store_value(norm, 2 * channels + k, mean);
  store_value(norm, 3 * channels + k, invstd);
}

struct RunningPair {
  double mean;
  double var;
};

// The running statistics of channel k, in place, by the unbiased variance; gives what they were.
RF_DEVICE RunningPair update_channel(int64_t k, double mean, double m2, double elements,
                                     double factor, const ChannelVector& running_mean,
                                     const ChannelVector& running_var) {
  const double variance = m2 / (elements - 1.0);
  const double kept_mean = load_value(running_mean, k);
  const double kept_var = load_value(running_var, k);
  store_value(running_mean, k, __builtin_fma(factor, mean, (1.0 - factor) * kept_mean));
  store_value(running_var, k, __builtin_fma(factor, variance, (1.0 - factor) * kept_var));
  return {kept_mean, kept_var};
}

// The number of batches with this one; it is not stored.
RF_DEVICE int64_t counted_with_this(const void* tracked, bool is_long) {
  if (is_long) return ptx::load_global(static_cast<const int64_t*>(tracked)) + 1;
  return ptx::load_global(static_cast<const int32_t*>(tracked)) + 1;
}

RF_DEVICE void store_count(void* tracked, bool is_long, int64_t counted) {
  if (is_long) {
    ptx::store_global(static_cast<int64_t*>(tracked), counted);
  } else {
    ptx::store_global(static_cast<int32_t*>(tracked), static_cast<int32_t>(counted));
  }
}

}  // namespace resnet_fused
