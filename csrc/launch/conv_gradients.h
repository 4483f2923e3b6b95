// The C interface of conv_dgrad and conv_wgrad on the GPU: the gradients of a convolution whose
// BatchNorm is frozen. Knows no framework. Used as conv_bn_act.h is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_act.h"

extern "C" {

// With dz = dy where not (y <= 0), else 0:
//   conv_dgrad  x = conv^T(round(scale * dz), weight)   rounded to dtype; float: to TF32
//   conv_wgrad  weight[k] = scale[k] * sum over pixels of dz[k] x
// Tensors of four dimensions, strides in elements and not negative; what is written has no two
// elements in one place and overlaps no input. A scale that is not finite reaches conv_dgrad's
// whole result.
struct RfConvGradient {
  const void* dy;  // [N, K, P, Q]
  const void* y;   // [N, K, P, Q]; null: no ReLU
  void* x;         // [N, C, H, W]; conv_dgrad writes the gradient here, conv_wgrad reads
  void* weight;    // [K, C / groups, R, S]; conv_wgrad writes the gradient here, conv_dgrad reads
  const void* scale;   // [K] float
  int32_t dtype;       // resnet_fused::DataType of dy, y, x and weight: not kFloat64
  int32_t allow_tf32;  // float products may be rounded to TF32; without it float is refused
  int32_t groups;
  int64_t x_size[4];
  int64_t weight_size[4];
  int64_t dy_stride[4];
  int64_t y_stride[4];
  int64_t x_stride[4];
  int64_t weight_stride[4];
  int64_t stride[2];  // of the convolution; vertical, horizontal
  int64_t padding[2];
  int64_t dilation[2];
};

// The tables of configurations; null for an index that there is not. conv_dgrad: m counts input
// pixels and n input channels; conv_wgrad: output channels, and taps times input channels.
int32_t rf_conv_dgrad_configurations(void);
int32_t rf_conv_wgrad_configurations(void);
const RfConvConfiguration* rf_conv_dgrad_configuration(int32_t index);
const RfConvConfiguration* rf_conv_wgrad_configuration(int32_t index);

// Choose configuration and splits, as rf_conv_bn_act_plan does. Where dy or the result is empty,
// nothing is launched (plan->launches is 0), and the caller fills the result with zeros.
int32_t rf_conv_dgrad_plan(const RfConvGradient* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);
int32_t rf_conv_wgrad_plan(const RfConvGradient* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);

// Run on the current device and the given cudaStream_t; 0, or a cudaError_t. The workspace is
// aligned to 256 bytes; no other call may use it meanwhile.
int rf_conv_dgrad_cuda(const RfConvGradient* problem, const RfConvPlan* plan, void* workspace,
                       void* stream);
int rf_conv_wgrad_cuda(const RfConvGradient* problem, const RfConvPlan* plan, void* workspace,
                       void* stream);

}  // extern "C"
