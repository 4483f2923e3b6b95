// The C interface of the stem on the GPU: what the bindings, a driver or the tests call. Knows no
// framework. It is that of the convolutions (see conv_bn_act.h); a split is a strip of the image.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_act.h"
#include "e4m3_type.h"
#include "flow.h"
#include "gpu.h"

extern "C" {

// out = maxpool(relu(scale * conv(v, weight) + shift)) * out_factor, v = a * x + b with input_norm,
// rounded once; e4m3 saturates. Tensors of
// four dimensions, strides in elements and not negative; out has no two elements in one place and
// overlaps no input.
struct RfStem {
  const void* x;           // [N, C, H, W]
  const void* weight;      // [K, C, R, S]
  const void* scale;       // [K] float
  const void* shift;       // [K] float
  const void* input_norm;  // [2, C] float; null: none
  void* out;               // [N, K, P, Q], behind the pooling
  int32_t dtype;           // resnet_fused::DataType of weight
  int32_t out_dtype;       // of out: dtype, or kFloat8E4M3
  float out_factor;        // one over what a stored 1 of out is worth; 1 unless it is e4m3
  int32_t image;           // resnet_fused::StemImage: what x holds
  int64_t x_size[4];
  int64_t weight_size[4];
  int64_t x_stride[4];
  int64_t weight_stride[4];
  int64_t out_stride[4];
  int64_t stride[2];  // vertical, horizontal
  int64_t padding[2];
  int64_t pool_kernel[2];
  int64_t pool_stride[2];
  int64_t pool_padding[2];
  RfFlow flow;
};

// m: columns of the convolution that a tile computes; n: its filters; stages: pairs of the image's
// rows in shared memory, of step_bytes a row.
int32_t rf_stem_configurations(void);
const RfConvConfiguration* rf_stem_configuration(int32_t index);

// splits: strips that an image is cut into along its height. Else as rf_conv_bn_act_plan; what the
// kernel is not made for is refused, with the reason.
int32_t rf_stem_plan(const RfStem* problem, const RfGpu* gpu, int32_t configuration, int32_t splits,
                     RfConvPlan* plan, char* why, size_t why_bytes);

// As rf_conv_bn_act_cuda; there is no workspace.
int rf_stem_cuda(const RfStem* problem, const RfConvPlan* plan, void* workspace, void* stream);

}  // extern "C"
