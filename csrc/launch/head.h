// The C interface of the head on the GPU: what the bindings, a driver or the tests call. Knows no
// framework. It is that of the convolutions; see conv_bn_act.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_act.h"
#include "flow.h"
#include "gpu.h"

extern "C" {

// out = mean(x over H and W) @ weight.T [+ bias]. Strides in elements and not negative; out
// overlaps no input.
struct RfHead {
  const void* x;       // [N, C, H, W]
  const void* weight;  // [classes, C]
  const void* bias;    // [classes], contiguous; null: none
  void* out;           // [N, classes], contiguous
  int32_t dtype;       // resnet_fused::DataType of all of them
  int64_t classes;
  int64_t x_size[4];
  int64_t x_stride[4];
  int64_t weight_stride[2];
  RfFlow flow;
};

// m: images of a tile; n: its classes; warps_m: those that share a tile's reduction.
int32_t rf_head_configurations(void);
const RfConvConfiguration* rf_head_configuration(int32_t index);

// splits: 1, or 0. The workspace holds the means. What the kernels are not made for is refused.
int32_t rf_head_plan(const RfHead* problem, const RfGpu* gpu, int32_t configuration, int32_t splits,
                     RfConvPlan* plan, char* why, size_t why_bytes);

// As rf_conv_bn_act_cuda; two kernels, one after the other.
int rf_head_cuda(const RfHead* problem, const RfConvPlan* plan, void* workspace, void* stream);

}  // extern "C"
