// Steps of TMA whose pixels threads put through a BatchNorm where they have landed: what that is
// predicted to take, and what keeps a norm from it. Inside of this room. None of the rates has been
// measured by this project on a GPU; only their proportions matter.
#pragma once

#include <cstdint>
#include <string>

#include "conv_bn_act_tma.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {

// Instructions to load, widen, multiply, add, round, compare and store an element; and those of
// single threads that three warps issue in a cycle, at two thirds of one a warp.
constexpr double kTransformInstructions = 4.5;
constexpr double kTransformInstructionsACycle = 64;
constexpr int64_t kNormedChannels = 8;  // that a thread transforms at a time
constexpr int64_t kRowsTogether = 24;   // that all threads begin with, of 64 channels
constexpr double kTransformThreadCount = 96;
// Instructions of each thread beside: for a box of its own channels, and to find which pixels of
// a step a tap sees inside of their image (counted in what ptxas 13.0 makes).
constexpr double kBoxInstructions = 65;
constexpr double kFindInstructions = 35;

// Of so many boxes of `pixels` by 64 channels; taps: by which the step's pixels are looked for.
inline StepTransform step_transform(int64_t boxes, int64_t pixels, int64_t taps = 0) {
  const int64_t rows = boxes * divide_up(pixels, kRowsTogether) * kRowsTogether;
  const double elements = static_cast<double>(rows) * kStepElements;
  const double each =
      static_cast<double>(boxes) * kBoxInstructions + static_cast<double>(taps) * kFindInstructions;
  const double instructions = elements * kTransformInstructions + each * kTransformThreadCount;
  return {2.0 * static_cast<double>(boxes * pixels) * kStepRowBytes,
          instructions / kTransformInstructionsACycle};
}

// channels: of a group.
inline std::string norm_fault(int64_t channels, const void* norm) {
  if (channels % kNormedChannels != 0) {
    return "norm: " + std::to_string(channels) + " channels; a multiple of " +
           std::to_string(kNormedChannels) + " is accepted";
  }
  return is_aligned(norm) ? "" : "norm: address is not a multiple of 16";
}

}  // namespace resnet_fused
