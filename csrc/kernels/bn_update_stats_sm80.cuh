// bn_update_stats on the GPU, for sm_80 and later: the running mean and variance, in place, in
// double. One block takes all channels: it alone counts the batch, and averages with the number
// that it counted.
#pragma once

#include "../device/channel_norm.h"
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

__global__ void __launch_bounds__(kUpdateThreads)
    bn_update_stats_kernel(const __grid_constant__ BnUpdateStatsArguments arguments) {
  double factor = arguments.factor;
  if (arguments.tracked != nullptr) {
    const ptx::SharedAddress scratch = ptx::shared_address(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
      const int64_t counted = counted_with_this(arguments.tracked, arguments.tracked_is_long);
      store_count(arguments.tracked, arguments.tracked_is_long, counted);
      ptx::store_shared(scratch, static_cast<double>(counted));
    }
    ptx::sync_threads();
    if (arguments.cumulative) factor = 1.0 / ptx::load_shared<double>(scratch);
  }
  const double elements = elements_of(arguments.total, arguments.count);
  if (!(elements > 0.0)) return;  // all ranks may be empty
  const int64_t channels = arguments.channels;
  for (int64_t k = threadIdx.x; k < channels; k += kUpdateThreads) {
    update_channel(k, load_value(arguments.stats, k), load_value(arguments.stats, channels + k),
                   elements, factor, arguments.running_mean, arguments.running_var);
  }
}

}  // namespace resnet_fused
