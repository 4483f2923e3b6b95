// The launches of the stem for one dtype; each dtype's .cu file makes its own.
#pragma once

#include "../kernels/stem_sm80.cuh"
#include "launch.h"
#include "stem_tiles.h"

namespace resnet_fused {

template <class T, class Out>
int launch_stem_to(const StemArguments& arguments, int configuration, int32_t blocks,
                   void* stream) {
  const auto filters = static_cast<uint32_t>((arguments.filters + kStemFilters - 1) / kStemFilters);
  return StemShapes::with(configuration, [&]<class Shape>() -> int {
    return RF_LAUNCH_EARLY(arguments.follows, (stem_kernel<T, Out, Shape>),
                           dim3(static_cast<uint32_t>(blocks), filters), dim3(Shape::kThreads),
                           Shape::kSharedBytes, static_cast<cudaStream_t>(stream), arguments);
  });
}

template <class T>
int launch_stem(const StemArguments& arguments, int configuration, int32_t blocks, void* stream) {
  const auto launch = arguments.quantised ? launch_stem_to<T, Float8E4M3> : launch_stem_to<T, T>;
  return launch(arguments, configuration, blocks, stream);
}

}  // namespace resnet_fused
