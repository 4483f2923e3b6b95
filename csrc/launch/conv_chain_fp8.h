// The C interface of conv_chain_fp8 on the GPU: conv_chain on e4m3 operands, for sm_90a alone.
// Called as conv_chain.h says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_chain.h"
#include "e4m3_type.h"

extern "C" {

// shortcut = residual_factor * residual, or with s e4m3, saturated,
//            s = (projection_scale * conv1x1(projected, projection_weight) + projection_shift) *
//                projection_factor,  residual_factor * s
// out  = relu(scale * conv1x1(x, weight) + shift + shortcut) * out_factor
// next = relu(next_scale * conv1x1(out, next_weight) + next_shift) * next_factor
// e4m3 saturated, as are all tensors.
struct RfConvChainFp8 {
  RfConvChain chain;        // of dtype kFloat8E4M3
  float residual_factor;    // what a stored 1 of the shortcut is worth
  float projection_factor;  // one over it
  float out_factor;         // one over what a stored 1 of out is worth
  float next_factor;        // likewise
};

int32_t rf_conv_chain_fp8_configurations(void);
const RfConvConfiguration* rf_conv_chain_fp8_configuration(int32_t index);
int32_t rf_conv_chain_fp8_plan(const RfConvChainFp8* problem, const RfGpu* gpu,
                               int32_t configuration, int32_t splits, RfConvPlan* plan, char* why,
                               size_t why_bytes);
int rf_conv_chain_fp8_cuda(const RfConvChainFp8* problem, const RfConvPlan* plan, void* workspace,
                           void* stream);

}  // extern "C"
