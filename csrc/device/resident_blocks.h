// How many blocks of a convolution the compiler leaves registers for on one multiprocessor.
#pragma once

#include "halo_shape.h"
#include "tile_shape.h"

namespace resnet_fused {

// Of a multiprocessor, in KiB, and what the system keeps of it for each block (CUDA C++ Programming
// Guide, Technical Specifications per Compute Capability).
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200 || __CUDA_ARCH__ == 1210)
constexpr int kMultiprocessorShared = 100;
#else
constexpr int kMultiprocessorShared = 164;  // or more
#endif
constexpr int kReservedShared = 1024;

// Shared memory that a block of a configuration takes at least, in bytes. Windows: over images of 7
// pixels a row, as narrow as those of ResNets become.
template <class Shape>
constexpr int least_shared() {
  if constexpr (requires { Shape::kWindows; }) {
    return Shape::kStages * Shape::kN * kHaloRowBytes +
           static_cast<int>(halo_bytes(Shape::kM, 7, Shape::kWindows));
  } else if constexpr (requires { Shape::kFiltersBytes; }) {
    return Shape::kFiltersBytes + Shape::kRingBytes;
  } else {
    return Shape::kRingBytes;
  }
}

// Blocks that its configuration asks for, or fewer where more would find no shared memory: registers
// kept for those would only be missing in the others. For __launch_bounds__.
template <class Shape>
constexpr int kResidentBlocks = [] {
  constexpr int kFit = kMultiprocessorShared * 1024 / (least_shared<Shape>() + kReservedShared);
  return kFit < 1 ? 1 : kFit < Shape::kBlocks ? kFit : Shape::kBlocks;
}();

}  // namespace resnet_fused
