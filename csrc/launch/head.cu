// The launches of the head.
#include "../kernels/head_sm80.cuh"
#include "head_tiles.h"
#include "launch.h"

namespace resnet_fused {
namespace {

constexpr uint32_t divide(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

template <class T>
int launch_head(const HeadArguments& arguments, int configuration, bool wide, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t units = static_cast<int64_t>(arguments.images) * (arguments.pitch / kHeadChannels);
  const dim3 grid(divide(units, kHeadMeanThreads / 32));
  const auto pool = wide ? head_mean_kernel<T, true> : head_mean_kernel<T, false>;
  const int error = RF_LAUNCH_EARLY(arguments.follows, pool, grid, dim3(kHeadMeanThreads), 0,
                                    cuda_stream, arguments);
  if (error != cudaSuccess) return error;
  return HeadShapes::with(configuration, [&]<class Shape>() -> int {
    const dim3 tiles(divide(arguments.classes, Shape::kN), divide(arguments.images, Shape::kM));
    const auto multiply = arguments.wide_weight != 0 ? head_linear_kernel<T, Shape, true>
                                                     : head_linear_kernel<T, Shape, false>;
    return RF_LAUNCH_EARLY(arguments.dependent, multiply, tiles, dim3(Shape::kThreads),
                           Shape::kSharedBytes, cuda_stream, arguments);
  });
}

}  // namespace

int launch_head_bfloat16(const HeadArguments& arguments, int configuration, bool wide,
                         void* stream) {
  return launch_head<BFloat16>(arguments, configuration, wide, stream);
}

int launch_head_float16(const HeadArguments& arguments, int configuration, bool wide,
                        void* stream) {
  return launch_head<Float16>(arguments, configuration, wide, stream);
}

}  // namespace resnet_fused
