// Where what is added to the gradient of a pixel lies, if only every addend_step-th row and column
// has such.
#pragma once

#include <cstdint>

#include "addend_pixel.h"
#include "grad1x1_geometry.h"

namespace resnet_fused {

// Of pixel m, from the block's first channel on; null: there is nothing to add.
template <class T>
RF_DEVICE const T* addend_of(const Grad1x1Arguments& arguments, int32_t m, int32_t end,
                             int32_t first_channel) {
  if (m >= end) return nullptr;
  Pixel at = pixel_of(m, arguments.grid);
  if (!to_addend(at, arguments.addend_step)) return nullptr;
  return static_cast<const T*>(arguments.addend) + first_channel +
         offset_of(at, arguments.addend_strides);
}

}  // namespace resnet_fused
