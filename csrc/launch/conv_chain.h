// The C interface of conv_chain on the GPU: what the bindings, a driver or the tests call. Knows no
// framework. Plans and configurations are conv_bn_act's structures.
#pragma once

#include "conv_bn_act.h"
#include "flow.h"

extern "C" {

// out  = relu(scale * conv1x1(x, weight) + shift + shortcut), the shortcut being `residual` or
//        projection_scale * conv1x1(projected, projection_weight) + projection_shift
// next = relu(next_scale * conv1x1(out, next_weight) + next_shift)
// and where there is a convolution in front, of stride 1 and padding 1, x above is
//        relu(front_scale * conv3x3(x, front_weight) + front_shift), rounded to dtype
// Tensors of four dimensions, strides in elements and not negative; a result has no two elements in
// one place and overlaps no input, nor the other one.
struct RfConvChain {
  const void* x;                  // [N, K, H, W]; with a front [N, B, H, W]
  const void* weight;             // [C, K, 1, 1]
  const void* residual;           // [N, C, H, W], unless the shortcut is projected
  const void* projected;          // [N, D, P, Q], every projection_stride-th pixel is read
  const void* projection_weight;  // [C, D, 1, 1]
  const void* next_weight;        // [M, C, 1, 1]
  const void* front_weight;       // [K, B, 3, 3]
  void* out;                      // [N, C, ceil(H / out_stride), ceil(W / out_stride)]
  void* following;                // [N, M, H, W]
  const void* scale;              // [C] float, as shift, projection_scale and projection_shift
  const void* shift;
  const void* projection_scale;
  const void* projection_shift;
  const void* next_scale;  // [M] float, as next_shift
  const void* next_shift;
  const void* front_scale;  // [K] float, as front_shift
  const void* front_shift;
  int32_t dtype;       // resnet_fused::DataType of the tensors: kBFloat16 or kFloat16
  int32_t reverse;     // the batch is walked from its end
  int32_t projects;    // the shortcut is a projection, not `residual`
  int64_t out_stride;  // 1 or 2
  int64_t projection_stride;
  int64_t x_size[4];
  int64_t channels;            // C
  int64_t projected_channels;  // D
  int64_t next_channels;       // M; 0: there is no next convolution
  int64_t front_channels;      // K where there is a front; 0: there is none
  int64_t x_stride[4];
  int64_t residual_stride[4];
  int64_t projected_stride[4];
  int64_t out_strides[4];
  int64_t following_stride[4];
  int64_t weight_stride[4];
  int64_t projection_weight_stride[4];
  int64_t next_weight_stride[4];
  RfFlow flow;
  int64_t front_weight_stride[4];
};

// A configuration's n is how many channels of next it has room for; its shared_bytes are those of
// 64 channels of x, of as many in front of it in rows of 56 pixels where the configuration is made
// for a front, and a shortcut that is a tensor.
int32_t rf_conv_chain_configurations(void);
// Null for an index that there is not.
const RfConvConfiguration* rf_conv_chain_configuration(int32_t index);

// As rf_conv_bn_act_plan; there are no splits, 0 or 1 is accepted.
int32_t rf_conv_chain_plan(const RfConvChain* problem, const RfGpu* gpu, int32_t configuration,
                           int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);

// As rf_conv_bn_act_cuda; no workspace is used.
int rf_conv_chain_cuda(const RfConvChain* problem, const RfConvPlan* plan, void* workspace,
                       void* stream);

}  // extern "C"
