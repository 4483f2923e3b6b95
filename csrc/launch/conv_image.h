// What the plans of kernels share that read an image of a few channels by its rows; see
// ../device/image_shape.h. Inside of this room.
#pragma once

#include "../device/image_shape.h"
#include "conv_plan.h"

namespace resnet_fused {

// Whether x is what those kernels are for, whatever keeps them from it.
template <class Problem>
bool is_image(const Problem& problem) {
  return problem.groups == 1 && problem.weight_size[1] <= kImageChannels;
}

// What keeps such a kernel from a convolution; null if nothing. normed: x is read through a
// BatchNorm.
template <class Problem>
const char* image_fault(const Problem& problem, bool normed) {
  if (bytes_of(problem.dtype) != 2) return "an image is read by rows in 16 bits";
  if (normed) return "an image is not read through a BatchNorm";
  if (!is_image(problem) || problem.weight_size[2] > kImageTapRows ||
      problem.weight_size[3] > kImageTaps) {
    return "an image has up to 4 channels, in one group, and filters of up to 7 x 8";
  }
  if (problem.stride[1] != kImageStride || problem.dilation[1] != 1) {
    return "an image is read by rows with a stride of 2 and a dilation of 1 along them";
  }
  return nullptr;
}

}  // namespace resnet_fused
