// What the blocks of conv_bn_grad1x1 have left, added in fixed order whichever of them ended first.
#pragma once

#include <cstdint>

#include "../device/grad1x1_geometry.h"
#include "../device/scalar.h"
#include "../ptx/ptx.h"

namespace resnet_fused {

constexpr int kGrad1x1MergeThreads = 256;

// Adds the parts of the weights' gradient, and behind them those of the sums, an element a thread.
template <class T>
__global__ void __launch_bounds__(kGrad1x1MergeThreads)
    conv_bn_grad1x1_merge_kernel(const __grid_constant__ Grad1x1Arguments arguments) {
  const int64_t weights = int64_t{arguments.filters} * arguments.channels;
  const int64_t sums = int64_t{arguments.sum_rows} * arguments.channels;
  const int64_t element = int64_t{blockIdx.x} * kGrad1x1MergeThreads + threadIdx.x;
  if (element >= weights + sums) return;
  const bool of_weights = element < weights;
  const int64_t each = of_weights ? weights : sums;
  const float* from =
      of_weights ? arguments.partial + element : arguments.partial_sums + (element - weights);
  double total = 0;
#pragma unroll 4
  for (int32_t part = 0; part < arguments.parts; ++part) {
    total += static_cast<double>(ptx::load_global(from + part * each));
  }
  const auto sum = static_cast<float>(total);
  if (of_weights) {
    const int64_t k = element / arguments.channels;
    const int64_t c = element - k * arguments.channels;
    ptx::store_global(
        static_cast<T*>(arguments.dweight) + k * arguments.dweight_k + c * arguments.dweight_c,
        narrow<T>(sum));
  } else {
    ptx::store_global(arguments.sums + (element - weights), sum);
  }
}

}  // namespace resnet_fused
