// The windows of a max pooling, as the passes over it are told.
#pragma once

#include <cstdint>

#include "channel_walk.h"

namespace resnet_fused {

struct PoolWindows {
  int32_t kernel[2];
  int32_t step[2];
  int32_t padding[2];
  int32_t size[2];     // of the image
  int32_t windows[2];  // along each dimension
  WalkOperand taps;    // uint8: kernel[1] r + s of the tap that won
};

// Place of [image, row, column] in an operand, without its channel.
RF_HOST_DEVICE int64_t pool_place(const WalkOperand& operand, int64_t image, int32_t row,
                                  int32_t column) {
  return image * operand.pixel[0] + row * operand.pixel[1] + column * operand.pixel[2];
}

}  // namespace resnet_fused
