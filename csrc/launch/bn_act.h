// The C interface of bn_act: what the bindings, a driver or an emulator call. Knows no framework.
#pragma once

#include <cstdint>

#include "../device/bn_act.h"
#include "flow.h"

extern "C" {

// Four-dimensional tensors in [N, C, H, W] order, strides in elements.
struct RfBnActTensors {
  const void* x;
  const void* residual;  // null: none
  void* out;
  const void* scale;  // [C] float, or double when x is double
  const void* shift;  // [C]
  int32_t dtype;      // resnet_fused::DataType
  int32_t relu;
  int64_t size[4];
  int64_t x_stride[4];
  int64_t residual_stride[4];
  int64_t out_stride[4];
};

// Orders the loops by the output's memory, drops loops of size 1 and merges neighbours.
void rf_bn_act_plan(const RfBnActTensors* tensors, resnet_fused::BnActLoop* loop);

// Elements [begin, end) of the loop on this thread, in the best instruction set of this CPU.
void rf_bn_act_cpu(const resnet_fused::BnActLoop* loop, int64_t begin, int64_t end);

// The whole loop on the current device and the given cudaStream_t; 0, or a cudaError_t.
// Nothing is launched for an empty loop.
int rf_bn_act_cuda(const resnet_fused::BnActLoop* loop, const RfFlow* flow, void* stream);

// What a cudaError_t means.
const char* rf_cuda_error(int error);

}  // extern "C"
