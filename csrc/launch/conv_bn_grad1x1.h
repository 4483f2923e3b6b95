// The C interface of conv_bn_grad1x1 on the GPU: what conv_bn_dgrad and conv_bn_wgrad make of a 1x1
// convolution between two BatchNorms, of one read of its operands. Used as conv_bn_act.h is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_dgrad.h"

extern "C" {

// The weights' gradient = sum over pixels of dy h, with dy as of conv_bn_dgrad and
// h = round(relu(scale x + shift)), or x itself.
struct RfConvBnGrad1x1 {
  // Both gradients' operands, and what conv_bn_dgrad makes of them. `raw` is x, which is read in
  // any case; unless `reduced` it is no raw output, and neither mask nor sums are taken.
  RfConvBnDgrad image;
  void* dweight;          // [K, C, 1, 1], written
  int32_t dweight_dtype;  // resnet_fused::DataType: that of dz, or kFloat32
  int64_t dweight_stride[4];
};

int32_t rf_conv_bn_grad1x1_configurations(void);
// m counts filters, n input channels of a block.
const RfConvConfiguration* rf_conv_bn_grad1x1_configuration(int32_t index);
// splits: parts of the pixels, each with a block for every n channels. Whether two kernels would be
// faster is not asked here. Nothing is launched (plan->launches is 0) where a tensor is empty.
int32_t rf_conv_bn_grad1x1_plan(const RfConvBnGrad1x1* problem, const RfGpu* gpu,
                                int32_t configuration, int32_t splits, RfConvPlan* plan, char* why,
                                size_t why_bytes);
int rf_conv_bn_grad1x1_cuda(const RfConvBnGrad1x1* problem, const RfConvPlan* plan, void* workspace,
                            void* stream);

}  // extern "C"
