// What bn_add_act_conv_stats' kernel is told beside what conv_bn_stats' is. Plain values, which a
// launch computes on the host.
#pragma once

#include <cstdint>

#include "stats_geometry.h"

namespace resnet_fused {

// Pixels of all three tensors [N, C, H, W] lie one behind the other, channels side by side.
struct BlockEndArguments {
  ConvBnStatsArguments stats;  // x is the last raw output, scale and shift its BatchNorm's
  const void* shortcut;
  const float* shortcut_scale;  // [C] of a projection's BatchNorm; null: it is added as it is
  const float* shortcut_shift;  // [C]
  void* out;
  int64_t raw_pixel;  // elements from one pixel to the next
  int64_t shortcut_pixel;
  int64_t out_pixel;
};

}  // namespace resnet_fused
