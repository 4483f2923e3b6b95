// The C interface of conv_bn_stats on the GPU; it is used as conv_bn_act's is, see conv_bn_act.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device/channel_vector.h"
#include "conv_bn_act.h"

extern "C" {

// What BatchNorm makes of the statistics of y, in the same launch and to the bits of bn_finalize
// and bn_update_stats; see bn_finalize_cuda.h. Vectors [K] are dense; data null: absent.
struct RfStatsNorm {
  void* norm;  // [4, K] float: scale, shift, mean, invstd; null: nothing of all this
  resnet_fused::ChannelVector gamma;
  resnet_fused::ChannelVector beta;
  double eps;
  resnet_fused::ChannelVector running_mean;  // in place; absent: nothing is updated or counted
  resnet_fused::ChannelVector running_var;
  void* kept;               // [2, K] double: the running ones as they were; unused without them
  void* tracked;            // [1] integer, counted up by one, or null
  int32_t tracked_is_long;  // int64, not int32
  int32_t cumulative;       // the factor is 1 / tracked
  double factor;
};

// y = conv(relu(scale * x + shift), weight), and of the rounded y each channel's mean and M2, the
// sum of (y - mean)^2.
struct RfConvBnStats {
  // x, weight, dtype, sizes, strides and geometry; `out` is y. It has no residual, scale, shift,
  // ReLU or order among other launches, and brings no counters.
  RfConvBnAct conv;
  const void* norm;       // [4, C] float, of which scale and shift are read; unused unless normed
  int32_t normed;         // x is read through norm, and not as it is; a plan needs no norm for that
  void* stats;            // [2, K] float: mean, M2
  RfStatsNorm finalized;  // no plan depends on it
};

int32_t rf_conv_bn_stats_configurations(void);
const RfConvConfiguration* rf_conv_bn_stats_configuration(int32_t index);
int32_t rf_conv_bn_stats_plan(const RfConvBnStats* problem, const RfGpu* gpu, int32_t configuration,
                              int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);
// Nothing is launched for an empty y, and stats stay as they are.
int rf_conv_bn_stats_cuda(const RfConvBnStats* problem, const RfConvPlan* plan, void* workspace,
                          void* stream);

}  // extern "C"
