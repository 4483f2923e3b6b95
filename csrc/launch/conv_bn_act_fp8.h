// The C interface of conv_bn_act_fp8 on the GPU: conv_bn_act on e4m3 operands, for sm_90a alone.
// Called as conv_bn_act.h says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_act.h"
#include "e4m3_type.h"

extern "C" {

// out = act(scale * conv(x, weight) + shift [+ residual_factor * residual]) * out_factor, e4m3
// saturated.
struct RfConvBnActFp8 {
  RfConvBnAct conv;  // of dtype kFloat8E4M3; arrivals and allow_tf32 count for nothing
  // kFloat8E4M3 or a DataType. What the plan serves: e4m3, and e4m3, bfloat16 or float16.
  int32_t residual_dtype;
  int32_t out_dtype;
  float residual_factor;  // what a stored 1 of the residual is worth
  float out_factor;       // one over what a stored 1 of out is worth
};

int32_t rf_conv_bn_act_fp8_configurations(void);
const RfConvConfiguration* rf_conv_bn_act_fp8_configuration(int32_t index);
int32_t rf_conv_bn_act_fp8_plan(const RfConvBnActFp8* problem, const RfGpu* gpu,
                                int32_t configuration, int32_t splits, RfConvPlan* plan, char* why,
                                size_t why_bytes);
int rf_conv_bn_act_fp8_cuda(const RfConvBnActFp8* problem, const RfConvPlan* plan, void* workspace,
                            void* stream);

}  // extern "C"
