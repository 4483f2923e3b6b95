// What a launch tells its kernel of the BatchNorm behind it. Inside of this room.
#pragma once

#include "../device/stats_norm.h"
#include "conv_bn_stats.h"
#include "conv_strides.h"

namespace resnet_fused {

// ended: a counter in the workspace, cleared with the others; columns: that count themselves there.
inline StatsNorm stats_norm(const RfConvBnStats& problem, void* ended, int64_t columns) {
  const RfConvBnAct& conv = problem.conv;
  const RfStatsNorm& given = problem.finalized;
  const OutputSize size = output_size(conv);
  StatsNorm made{};
  if (given.norm == nullptr) return made;
  made.norm = static_cast<float*>(given.norm);
  made.gamma = given.gamma;
  made.beta = given.beta;
  made.elements = static_cast<double>(conv.x_size[0] * size.p * size.q);
  made.eps = given.eps;
  if (given.running_mean.data == nullptr) return made;
  made.running_mean = given.running_mean;
  made.running_var = given.running_var;
  made.kept = static_cast<double*>(given.kept);
  made.tracked = given.tracked;
  made.tracked_is_long = given.tracked_is_long != 0;
  made.cumulative = given.cumulative != 0;
  made.factor = given.factor;
  made.ended = static_cast<uint32_t*>(ended);
  made.columns = narrowed(columns);
  return made;
}

}  // namespace resnet_fused
