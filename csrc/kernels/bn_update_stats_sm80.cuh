// bn_update_stats on the GPU, for sm_80 and later: the running mean and variance, in place, in
// double. One block takes all channels: it alone counts the batch, and averages with the number
// that it counted.
#pragma once

#include "../device/channel_value.h"
#include "../ptx/barrier.h"
#include "../ptx/shared.h"

namespace resnet_fused {

constexpr int kUpdateThreads = 512;

struct BnUpdateStatsArguments {
  ChannelVector stats;         // [2, C] mean, M2
  ChannelVector running_mean;  // [C]
  ChannelVector running_var;   // [C]
  const double* total;         // [1], or null
  void* tracked;               // [1] integer, or null
  bool tracked_is_long;        // int64, not int32
  bool cumulative;             // the factor is 1 / tracked
  int64_t channels;
  double count;
  double factor;
};

// Counts up by one; gives the new number.
template <class Integer>
RF_DEVICE double count_batch(void* tracked) {
  auto* place = static_cast<Integer*>(tracked);
  const Integer counted = ptx::load_global(place) + 1;
  ptx::store_global(place, counted);
  return static_cast<double>(counted);
}

__global__ void __launch_bounds__(kUpdateThreads)
    bn_update_stats_kernel(const __grid_constant__ BnUpdateStatsArguments arguments) {
  double factor = arguments.factor;
  if (arguments.tracked != nullptr) {
    const ptx::SharedAddress scratch = ptx::shared_address(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
      const double counted = arguments.tracked_is_long ? count_batch<int64_t>(arguments.tracked)
                                                       : count_batch<int32_t>(arguments.tracked);
      ptx::store_shared(scratch, counted);
    }
    ptx::sync_threads();
    if (arguments.cumulative) factor = 1.0 / ptx::load_shared<double>(scratch);
  }
  const double elements = elements_of(arguments.total, arguments.count);
  if (!(elements > 0.0)) return;  // all ranks may be empty
  const int64_t channels = arguments.channels;
  for (int64_t k = threadIdx.x; k < channels; k += kUpdateThreads) {
    const double mean = load_value(arguments.stats, k);
    const double variance = load_value(arguments.stats, channels + k) / (elements - 1.0);
    const double kept_mean = load_value(arguments.running_mean, k);
    const double kept_var = load_value(arguments.running_var, k);
    store_value(arguments.running_mean, k, (1.0 - factor) * kept_mean + factor * mean);
    store_value(arguments.running_var, k, (1.0 - factor) * kept_var + factor * variance);
  }
}

}  // namespace resnet_fused
