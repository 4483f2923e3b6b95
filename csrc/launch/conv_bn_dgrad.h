// The C interface of conv_bn_dgrad on the GPU; it is used as conv_bn_act's is, see conv_bn_act.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_gradients.h"

extern "C" {

// With dy = round(A dz + (B y + C)), or dz itself:
//   x = conv^T(dy, weight) [+ addend], rounded once; 0 where round(scale * raw + shift) <= 0
//   sums = sum x, sum x (raw - mean), of each channel
// What a plan needs no memory for is said by flags.
struct RfConvBnDgrad {
  // dy is dz, y the raw output above, scale the coefficients [3, K] A, B, C, both unused unless
  // affine; x is the result.
  RfConvGradient conv;
  const void* addend;  // [N, C, ceil(H / addend_step), ceil(W / addend_step)]
  const void* raw;     // [N, C, H, W]
  const void* norm;    // [4, C] float, of which scale, shift and mean are read
  void* sums;          // [2, C] float
  int32_t affine;      // dz is read through y and coefficients
  int32_t added;       // the addend belongs to every addend_step-th row and column of x
  int32_t reduced;     // x is masked by raw and norm, and sums are taken
  int64_t addend_step;
  int64_t addend_stride[4];
  int64_t raw_stride[4];
};

int32_t rf_conv_bn_dgrad_configurations(void);
// m counts input pixels, n input channels.
const RfConvConfiguration* rf_conv_bn_dgrad_configuration(int32_t index);
// Where dz or x is empty, nothing is launched (plan->launches is 0): an addend is the caller's to
// deal with then.
int32_t rf_conv_bn_dgrad_plan(const RfConvBnDgrad* problem, const RfGpu* gpu, int32_t configuration,
                              int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);
int rf_conv_bn_dgrad_cuda(const RfConvBnDgrad* problem, const RfConvPlan* plan, void* workspace,
                          void* stream);

}  // extern "C"
