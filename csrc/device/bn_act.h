// The arithmetic of bn_act, shared by the CPU and the CUDA kernels, and the loop that they run.
#pragma once

#include <cstdint>

#include "scalar.h"

RF_NAMESPACE_BEGIN

// y = max(fma(scale, x, shift) + residual, floor), in the compute type.
// The floor is 0 for a ReLU and -infinity for none, so one function serves both; the comparison
// is written so that a NaN fails it and stays.
template <class C>
struct BnAct {
  C floor;

  RF_HOST_DEVICE C operator()(C x, C scale, C shift) const {
    return clamp(fused_multiply_add(scale, x, shift));
  }
  RF_HOST_DEVICE C operator()(C x, C scale, C shift, C residual) const {
    return clamp(fused_multiply_add(scale, x, shift) + residual);
  }

 private:
  RF_HOST_DEVICE C clamp(C z) const { return floor > z ? floor : z; }
  static RF_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static RF_HOST_DEVICE double fused_multiply_add(double a, double b, double c) {
    return __builtin_fma(a, b, c);
  }
};

RF_NAMESPACE_END

namespace resnet_fused {

enum class DataType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

constexpr int kLoopDims = 4;

// A nest of at most four loops over the elements, outermost first, in the order of the output's
// memory, with neighbouring loops merged. Unused outer loops have size 1. Strides count elements;
// the channel stride is 1 in the loop that runs over channels and 0 elsewhere.
struct BnActLoop {
  const void* x;
  const void* residual;  // null: none
  void* out;
  const void* scale;  // [C] float, or double when x is double
  const void* shift;  // [C]
  DataType dtype;
  bool relu;
  int64_t elements;
  int64_t channels;
  int64_t size[kLoopDims];
  int64_t x_stride[kLoopDims];
  int64_t residual_stride[kLoopDims];
  int64_t out_stride[kLoopDims];
  int64_t channel_stride[kLoopDims];
};

}  // namespace resnet_fused
