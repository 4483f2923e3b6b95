// What bn_add_act_conv_stats' kernel for sm_90a is told beside what conv_bn_stats' is. Plain
// values, which a launch computes on the host.
#pragma once

#include "stats_walk.h"

namespace resnet_fused {

struct BlockEndTmaArguments {
  ConvStatsTmaArguments stats;  // conv.x is the last raw output, norm its BatchNorm's
  ptx::TensorMap shortcut;      // {C, pixels}
  ptx::TensorMap made;          // likewise: the block's output
  const float* shortcut_scale;  // [C] of a projection's BatchNorm; null: it is added as it is
  const float* shortcut_shift;  // [C]
};

}  // namespace resnet_fused
