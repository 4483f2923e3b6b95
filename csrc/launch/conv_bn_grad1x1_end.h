// The C interface of conv_bn_grad1x1_end on the GPU: what conv_bn_dgrad_end and conv_bn_wgrad make
// of a 1x1 convolution behind a block's end, of one read of its operands. Used as conv_bn_act.h is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_dgrad_end.h"

extern "C" {

// The weights' gradient = sum over pixels of dy out, with dy as of conv_bn_dgrad.
struct RfConvBnGrad1x1End {
  RfConvBnDgradEnd end;   // the input's gradient; `out` is what the convolution read
  void* dweight;          // [K, C, 1, 1], written
  int32_t dweight_dtype;  // resnet_fused::DataType: that of dz, or kFloat32
  int64_t dweight_stride[4];
};

int32_t rf_conv_bn_grad1x1_end_configurations(void);
// As conv_bn_grad1x1's, as are plans.
const RfConvConfiguration* rf_conv_bn_grad1x1_end_configuration(int32_t index);
int32_t rf_conv_bn_grad1x1_end_plan(const RfConvBnGrad1x1End* problem, const RfGpu* gpu,
                                    int32_t configuration, int32_t splits, RfConvPlan* plan,
                                    char* why, size_t why_bytes);
int rf_conv_bn_grad1x1_end_cuda(const RfConvBnGrad1x1End* problem, const RfConvPlan* plan,
                                void* workspace, void* stream);

}  // extern "C"
