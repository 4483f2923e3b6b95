// The C interface of training's passes on the GPU: what the bindings, a driver or the tests call.
// Knows no framework. A pass is a BnTrainingCall as the CPU's kernels take it, but for `tiles` and
// `workspace`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../device/bn_training.h"

extern "C" {

// What is launched, and how its work is cut; 0 blocks: nothing is.
struct RfBnPassPlan {
  int32_t wide;     // 16 bytes of channels a load, not one
  int32_t dense;    // pixels of every tensor lie in one loop
  int32_t columns;  // threads of a block along the channels
  int32_t rows;     // along the pixels
  int32_t ahead;    // pixels that a thread has in flight
  int64_t groups;   // of columns
  int64_t parts;    // blocks of a group
  int64_t arrivals_bytes;
  int64_t workspace_bytes;  // those at its begin, then the parts' sums
};

// A pure function of the call's sizes, strides, dtype and alignment; 0, or 1 with a reason where
// the kernels can't run it.
int32_t rf_bn_pass_plan(const resnet_fused::BnTrainingCall* call, RfBnPassPlan* plan, char* why,
                        size_t why_bytes);

// On the current device and the given cudaStream_t; 0, or a cudaError_t. `workspace` begins at a
// multiple of 16 bytes. Each is for one BnTrainingOp.
int rf_bn_add_act_cuda(const resnet_fused::BnTrainingCall* call, const RfBnPassPlan* plan,
                       void* workspace, void* stream);
int rf_bn_add_act_backward_cuda(const resnet_fused::BnTrainingCall* call, const RfBnPassPlan* plan,
                                void* workspace, void* stream);
int rf_bn_backward_apply_cuda(const resnet_fused::BnTrainingCall* call, const RfBnPassPlan* plan,
                              void* workspace, void* stream);

int rf_bn_act_pool_cuda(const resnet_fused::BnTrainingCall* call, const RfBnPassPlan* plan,
                        void* workspace, void* stream);
int rf_bn_act_pool_backward_cuda(const resnet_fused::BnTrainingCall* call, const RfBnPassPlan* plan,
                                 void* workspace, void* stream);

}  // extern "C"
