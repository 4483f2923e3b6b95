// The C interface of conv_bn_wgrad on the GPU: the gradient of a convolution's weights between two
// BatchNorms. Knows no framework. Used as conv_bn_act.h is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_gradients.h"

extern "C" {

// weight = sum over pixels of dy h, with dy = a dz + b y + c and h = relu(scale x + shift), each
// rounded to dtype before it is multiplied; dy is zero beside the output, h beside the image.
struct RfConvBnWgrad {
  // `dy` is dz, the gradient behind the BatchNorm, and `y` the convolution's raw output; `weight`
  // is written, in weight_dtype. `scale` is unused. A plan needs no pointers, but whether they are
  // multiples of 16.
  RfConvGradient product;
  const void* coefficients;  // [3, K] float a, b, c; unused unless affine
  const void* norm;      // [4, C] float, of which scale and shift are read; unused unless normed
  int32_t affine;        // dz is read through the BatchNorm's backward, with y; else as it is
  int32_t normed;        // x is read through norm, and not as it is
  int32_t weight_dtype;  // resnet_fused::DataType: dtype, or kFloat32
};

int32_t rf_conv_bn_wgrad_configurations(void);
const RfConvConfiguration* rf_conv_bn_wgrad_configuration(int32_t index);
// Where dz or the result is empty, nothing is launched, and the caller fills the result with zeros.
int32_t rf_conv_bn_wgrad_plan(const RfConvBnWgrad* problem, const RfGpu* gpu, int32_t configuration,
                              int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);
int rf_conv_bn_wgrad_cuda(const RfConvBnWgrad* problem, const RfConvPlan* plan, void* workspace,
                          void* stream);

}  // extern "C"
