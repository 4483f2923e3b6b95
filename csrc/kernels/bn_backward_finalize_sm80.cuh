// bn_backward_finalize on the GPU, for sm_80 and later: reductions become the coefficients of
// dy = A dz + B y + C, in double, a channel a thread.
#pragma once

#include "../device/channel_value.h"

namespace resnet_fused {

struct BnBackwardFinalizeArguments {
  ChannelVector sums;          // [rows, C] of this rank
  ChannelVector all_sums;      // [rows, C] of all ranks
  ChannelVector norm;          // [4, C] scale, shift, mean, invstd
  ChannelVector coefficients;  // [3, C] A, B, C
  ChannelVector dgamma;        // [C]
  ChannelVector dbeta;         // [C]
  const double* total;         // [1], or null
  int64_t channels;
  double count;
  int64_t row;  // of the sums that belongs to this BatchNorm
  bool frozen;
};

__global__ void __launch_bounds__(kVectorThreads)
    bn_backward_finalize_kernel(const __grid_constant__ BnBackwardFinalizeArguments arguments) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x;
  const int64_t channels = arguments.channels, row = arguments.row * channels;
  if (k >= channels) return;
  const double scale = load_value(arguments.norm, k);
  const double mean = load_value(arguments.norm, 2 * channels + k);
  const double invstd = load_value(arguments.norm, 3 * channels + k);
  double b = 0, c = 0;
  if (!arguments.frozen) {
    double elements = elements_of(arguments.total, arguments.count);
    if (elements < 1.0) elements = 1.0;
    const double plain = load_value(arguments.all_sums, k);
    const double centred = load_value(arguments.all_sums, row + k);
    // C of the rounded B, whose error then cancels in B (y - mean).
    b = as_stored(arguments.coefficients, -scale * invstd * (invstd * centred) / elements);
    c = -scale * plain / elements - b * mean;
  }
  store_value(arguments.coefficients, k, scale);
  store_value(arguments.coefficients, channels + k, b);
  store_value(arguments.coefficients, 2 * channels + k, c);
  store_value(arguments.dgamma, k, invstd * load_value(arguments.sums, row + k));
  store_value(arguments.dbeta, k, load_value(arguments.sums, k));
}

}  // namespace resnet_fused
