// What a merged channel's statistics become: mean and M2; and where a launch finalizes its output's
// BatchNorm, scale and shift, and the running statistics with this batch taken in.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "channel_norm.h"
#include "merge_chunks.h"
#include "stats_geometry.h"
#include "stats_norm.h"

namespace resnet_fused {

// Of channel k of `channels`, by one thread. merged: as stored, which is what others will read.
RF_DEVICE void take_in(const StatsNorm& to, int64_t k, int64_t channels, const Moments& merged) {
  const double mean = merged.mean;
  const double m2 = merged.m2;
  finalize_channel(k, channels, mean, m2, to.elements, to.eps, to.gamma, to.beta, {to.norm, false});
  if (to.running_mean.data == nullptr) return;
  double factor = to.factor;
  if (to.cumulative) {
    factor = 1.0 / static_cast<double>(counted_with_this(to.tracked, to.tracked_is_long));
  }
  const RunningPair kept =
      update_channel(k, mean, m2, to.elements, factor, to.running_mean, to.running_var);
  ptx::store_global(to.kept + k, kept.mean);
  ptx::store_global(to.kept + channels + k, kept.var);
}

// By all who have merged a column, one of whom has channel k's moments: the one that `writes`.
// Every column reads the number of batches before it counts itself as done, so that the last one
// may count this batch. `scratch`: 4 bytes of shared memory that nobody else uses.
template <class Shape, class Arguments>
RF_DEVICE void finish_channels(const Arguments& arguments, const WideMoments& all, int64_t k,
                               bool writes, ptx::SharedAddress scratch, uint32_t thread) {
  const int32_t channels = arguments.filters();
  const StatsNorm& to = arguments.finalized;
  if (writes) {
    const auto mean = static_cast<float>(all.mean);
    // As torch's, whichever pixel the Inf is in: it has no mean.
    const bool finite = mean - mean == 0.0f;
    const Moments merged{finite ? mean : mean - mean, static_cast<float>(all.m2)};
    ptx::store_global(arguments.stats + k, merged.mean);
    ptx::store_global(arguments.stats + channels + k, merged.m2);
    if (to.norm != nullptr) take_in(to, k, channels, merged);
  }
  if (to.tracked == nullptr) return;
  if (last_to_arrive<Shape>(to.ended, to.columns, scratch, thread) && thread == 0) {
    store_count(to.tracked, to.tracked_is_long, counted_with_this(to.tracked, to.tracked_is_long));
  }
}

}  // namespace resnet_fused
