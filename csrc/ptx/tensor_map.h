// A tensor map: what TMA has to know of a tensor and of the boxes that it moves. Made on the host
// by csrc/launch/tensor_map.h; a kernel takes it as a `const __grid_constant__ TensorMap`
// parameter.
#pragma once

#include <cstdint>

#if defined(RF_EMULATED) && defined(__GNUC__) && !defined(__clang__)
// GCC has passed such parameters in another way before version 4.6, and says so at each.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace resnet_fused::ptx {

// Aligned as the driver's CUtensorMap is; the instructions ask for 64 bytes.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace resnet_fused::ptx
