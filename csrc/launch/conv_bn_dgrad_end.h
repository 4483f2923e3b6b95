// The C interface of conv_bn_dgrad_end on the GPU; it is used as conv_bn_act's is, see
// conv_bn_act.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_dgrad.h"

extern "C" {

// What conv_bn_dgrad makes, but behind the ReLU of a block's end, whose result `out` is kept:
//   x = conv^T(dy, weight) [+ addend], rounded once; 0 where out <= 0
//   sums = sum x, sum x (raw - mean) [, sum x (residual - residual_mean)], of each channel
struct RfConvBnDgradEnd {
  // `reduced` is 1; of norm the mean alone is read; sums is [2, C] or, projected, [3, C] float.
  RfConvBnDgrad image;
  const void* out;            // [N, C, H, W], in x's dtype
  const void* residual;       // [N, C, H, W], the projection's raw output
  const void* residual_norm;  // [4, C] float, of which the mean is read
  int32_t projected;          // residual and residual_norm are read
  int64_t out_stride[4];
  int64_t residual_stride[4];
};

int32_t rf_conv_bn_dgrad_end_configurations(void);
// As conv_bn_dgrad's.
const RfConvConfiguration* rf_conv_bn_dgrad_end_configuration(int32_t index);
int32_t rf_conv_bn_dgrad_end_plan(const RfConvBnDgradEnd* problem, const RfGpu* gpu,
                                  int32_t configuration, int32_t splits, RfConvPlan* plan,
                                  char* why, size_t why_bytes);
int rf_conv_bn_dgrad_end_cuda(const RfConvBnDgradEnd* problem, const RfConvPlan* plan,
                              void* workspace, void* stream);

}  // extern "C"
