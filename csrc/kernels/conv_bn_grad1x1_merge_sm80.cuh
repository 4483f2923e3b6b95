// What the blocks of conv_bn_grad1x1 have left, added in fixed order whichever of them ended first.
#pragma once

#include <cstdint>

#include "../device/grad1x1_geometry.h"
#include "../device/scalar.h"
#include "../ptx/ptx.h"

namespace resnet_fused {

// A block adds so many elements, of which its warps share the parts: one thread's loads of all of
// them, one behind the other, would take longer than a small batch's products.
constexpr int kGrad1x1MergeElements = ptx::kWarpSize;
constexpr int kGrad1x1MergeWarps = 8;
constexpr int kGrad1x1MergeThreads = kGrad1x1MergeWarps * kGrad1x1MergeElements;
constexpr uint32_t kGrad1x1MergeBytes = kGrad1x1MergeThreads * sizeof(double);

// Adds the parts of the weights' gradient, and behind them those of the sums, an element a lane.
template <class T>
__global__ void __launch_bounds__(kGrad1x1MergeThreads)
    conv_bn_grad1x1_merge_kernel(const __grid_constant__ Grad1x1Arguments arguments) {
  const ptx::SharedAddress totals = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t lane = threadIdx.x % kGrad1x1MergeElements;
  const auto warp = static_cast<int32_t>(threadIdx.x / kGrad1x1MergeElements);
  const int64_t weights = int64_t{arguments.filters} * arguments.channels;
  const int64_t sums = int64_t{arguments.sum_rows} * arguments.channels;
  const int64_t element = int64_t{blockIdx.x} * kGrad1x1MergeElements + lane;
  const bool known = element < weights + sums;
  const bool of_weights = element < weights;
  double total = 0;
  if (known) {
    const float* from =
        of_weights ? arguments.partial + element : arguments.partial_sums + (element - weights);
    const int64_t each = of_weights ? weights : sums;
#pragma unroll 4
    for (int32_t part = warp; part < arguments.parts; part += kGrad1x1MergeWarps) {
      total += static_cast<double>(ptx::load_global(from + part * each));
    }
  }
  constexpr auto kTotalBytes = static_cast<uint32_t>(sizeof(double));
  ptx::store_shared(totals + threadIdx.x * kTotalBytes, total);
  ptx::sync_threads();
  if (warp != 0 || !known) return;
#pragma unroll
  for (uint32_t other = 1; other < kGrad1x1MergeWarps; ++other) {
    const uint32_t at = other * kGrad1x1MergeElements + lane;
    total += ptx::load_shared<double>(totals + at * kTotalBytes);
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
