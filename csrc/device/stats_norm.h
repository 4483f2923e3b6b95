// What a kernel that measures is told of its output's BatchNorm, which the blocks that merge the
// statistics may finalize in the same launch. Plain values, of host and device.
#pragma once

#include <cstdint>

#include "channel_vector.h"

namespace resnet_fused {

struct StatsNorm {
  float* norm;          // [4, K] scale, shift, mean, invstd; null: the statistics are all
  ChannelVector gamma;  // [K]; absent: 1
  ChannelVector beta;   // [K]; absent: 0
  double elements;      // a channel
  double eps;
  ChannelVector running_mean;  // [K], in place; absent: neither is updated, nor counted
  ChannelVector running_var;   // [K]
  double* kept;                // [2, K]: both as they were
  void* tracked;               // [1] integer, counted up by one, or null
  bool tracked_is_long;        // int64, not int32
  bool cumulative;             // the factor is 1 / tracked
  double factor;
  uint32_t* ended;  // counts columns of tiles that are done, zero before the launch
  int32_t columns;  // so many there are, over all groups
};

}  // namespace resnet_fused
