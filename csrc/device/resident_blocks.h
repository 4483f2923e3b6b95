// How many blocks of a convolution the compiler leaves registers for on one multiprocessor.
#pragma once

namespace resnet_fused {

// Of a multiprocessor, in KiB, and what the system keeps of it for each block (CUDA C++ Programming
// Guide, Technical Specifications per Compute Capability).
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMultiprocessorShared = 100;
#else
constexpr int kMultiprocessorShared = 228;  // or 164: there configurations keep what they ask for
#endif
constexpr int kReservedShared = 1024;

// Shared memory that a block of a configuration takes at least, in bytes.
template <class Shape>
constexpr int least_shared() {
  if constexpr (requires { Shape::kLeastShared; }) {
    return Shape::kLeastShared;
  } else {
    return Shape::kRingBytes;
  }
}

// Blocks that a configuration asks for, or fewer where more would find no shared memory: registers
// kept for those would only be missing in the others. For __launch_bounds__.
template <class Shape>
constexpr int kResidentBlocks = [] {
  constexpr int kFit = kMultiprocessorShared * 1024 / (least_shared<Shape>() + kReservedShared);
  return kFit < 1 ? 1 : kFit < Shape::kBlocks ? kFit : Shape::kBlocks;
}();

}  // namespace resnet_fused
