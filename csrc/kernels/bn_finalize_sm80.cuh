// bn_finalize on the GPU, for sm_80 and later: a batch's statistics become scale and shift, in
// double, a channel a thread.
#pragma once

#include <cmath>

#include "../device/channel_value.h"

namespace resnet_fused {

struct BnFinalizeArguments {
  ChannelVector stats;  // [2, C] mean, M2
  ChannelVector gamma;  // [C]; absent: 1
  ChannelVector beta;   // [C]; absent: 0
  ChannelVector norm;   // [4, C] scale, shift, mean, invstd
  const double* total;  // [1], or null
  int64_t channels;
  double count;
  double eps;
};

__global__ void __launch_bounds__(kVectorThreads)
    bn_finalize_kernel(const __grid_constant__ BnFinalizeArguments arguments) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x;
  const int64_t channels = arguments.channels;
  if (k >= channels) return;
  const ChannelVector& norm = arguments.norm;
  double elements = elements_of(arguments.total, arguments.count);
  if (elements < 1.0) elements = 1.0;
  const double mean = load_value(arguments.stats, k);
  const double variance = load_value(arguments.stats, channels + k) / elements;
  const double invstd = 1.0 / sqrt(variance + arguments.eps);
  double scale = invstd;
  if (arguments.gamma.data != nullptr) scale *= load_value(arguments.gamma, k);
  // Of the rounded scale, whose error then cancels in scale * (y - mean).
  double shift = -mean * as_stored(norm, scale);
  if (arguments.beta.data != nullptr) shift += load_value(arguments.beta, k);
  store_value(norm, k, scale);
  store_value(norm, channels + k, shift);
  store_value(norm, 2 * channels + k, mean);
  store_value(norm, 3 * channels + k, invstd);
}

}  // namespace resnet_fused
