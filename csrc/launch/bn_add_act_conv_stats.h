// The C interface of bn_add_act_conv_stats on the GPU; it is used as conv_bn_act's is, see
// conv_bn_act.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_stats.h"

extern "C" {

// out = round(relu(scale * y + shift + r)), z = conv(out, weight), and of the rounded z each
// channel's mean and M2. r: the shortcut, or residual_scale * shortcut + residual_shift.
struct RfBnAddActConvStats {
  // conv_bn_stats of a 1x1 convolution: x is y, norm its BatchNorm's, `out` is z; it is `normed`.
  RfConvBnStats stats;
  const void* residual;       // [N, C, H, W]
  const void* residual_norm;  // [4, C] float, of which scale and shift are read
  void* out;                  // [N, C, H, W]
  int32_t projected;          // the shortcut is read through residual_norm; a plan needs no values
  int64_t residual_stride[4];
  int64_t out_stride[4];
};

int32_t rf_bn_add_act_conv_stats_configurations(void);
const RfConvConfiguration* rf_bn_add_act_conv_stats_configuration(int32_t index);
// Whether two kernels would be faster is not asked here.
int32_t rf_bn_add_act_conv_stats_plan(const RfBnAddActConvStats* problem, const RfGpu* gpu,
                                      int32_t configuration, int32_t splits, RfConvPlan* plan,
                                      char* why, size_t why_bytes);
// Nothing is launched for an empty y or z: out and stats stay as they are.
int rf_bn_add_act_conv_stats_cuda(const RfBnAddActConvStats* problem, const RfConvPlan* plan,
                                  void* workspace, void* stream);

}  // extern "C"
