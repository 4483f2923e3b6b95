// bn_finalize on the GPU, for sm_80 and later: a batch's statistics become scale and shift, in
// double, a channel a thread.
#pragma once

#include "../device/channel_norm.h"

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
  double elements = elements_of(arguments.total, arguments.count);
  if (elements < 1.0) elements = 1.0;
  const double mean = load_value(arguments.stats, k);
  const double m2 = load_value(arguments.stats, channels + k);
  finalize_channel(k, channels, mean, m2, elements, arguments.eps, arguments.gamma, arguments.beta,
                   arguments.norm);
}

}  // namespace resnet_fused
