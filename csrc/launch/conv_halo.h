// What the plans of kernels by windows share; see ../device/halo_loader.h. Inside of this room.
#pragma once

#include "../device/halo_shape.h"

namespace resnet_fused {

constexpr const char* kNoWindows = "windows are for filters of 3x3, stride, padding and dilation 1";

// Whether the pixels that a tile's taps read follow one another.
template <class Problem>
bool taps_are_one_run(const Problem& problem) {
  const auto all = [](const int64_t (&values)[2], int64_t value) {
    return values[0] == value && values[1] == value;
  };
  return problem.weight_size[2] == kHaloSide && problem.weight_size[3] == kHaloSide &&
         all(problem.stride, 1) && all(problem.padding, 1) && all(problem.dilation, 1);
}

}  // namespace resnet_fused
