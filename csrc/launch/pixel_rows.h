// Tensors of which a 1x1 convolution of stride 1 reads or writes pixel after pixel of the whole
// batch, 16 bytes at a time. Inside of this room.
#pragma once

#include <cstdint>

#include "conv_strides.h"

namespace resnet_fused {

// Elements from one pixel to the next, where all of a batch lie one behind the other; else -1.
inline int64_t pixel_step(const int64_t (&size)[4], const int64_t (&stride)[4]) {
  int64_t step = 0;
  int64_t apart = 0;  // of neighbours along the dimension, counted in pixels
  constexpr int kInner[] = {3, 2, 0};
  for (const int d : kInner) {
    if (size[d] > 1) {
      if (apart == 0) {
        step = stride[d];
        apart = 1;
      }
      if (stride[d] != step * apart) return -1;
    }
    if (apart > 0) apart *= size[d];
  }
  return step;
}

// An operand [N, C, H, W] by its name.
struct PixelRows {
  const char* name;
  const void* pointer;
  const int64_t (&size)[4];
  const int64_t (&stride)[4];

  // bytes: of an element.
  bool readable(int64_t bytes) const {
    return is_wide(pointer, used(size, stride), size[1], bytes) && pixel_step(size, stride) >= 0;
  }
};

}  // namespace resnet_fused
