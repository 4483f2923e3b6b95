// What a tensor map says, as the emulator's TMA reads it. A GPU's are opaque; this one has the same
// size, so that kernels take either.
#pragma once

#include <cstdint>
#include <cstring>

namespace resnet_fused::emulator {

constexpr int kMostDimensions = 5;

struct TensorMapFields {
  static constexpr uint32_t kMagic = 0x50414D54;

  uint32_t magic;
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t swizzle;  // bytes of its span: 0, 32, 64, 128
  bool im2col;
  bool rounds;  // loads round float32 to TF32
  uint8_t* address;
  uint64_t strides[kMostDimensions - 1];  // bytes, of the dimensions behind the first
  uint32_t last[kMostDimensions];         // sizes - 1: a size may be 2^32
  uint16_t box[kMostDimensions];          // elements; im2col: channels, pixels
  uint8_t element_strides[kMostDimensions];
  bool fill_nan;
  int16_t lower[kMostDimensions - 2];  // im2col: corners, {W, H, D}
  int16_t upper[kMostDimensions - 2];

  int64_t size(int dimension) const { return int64_t{last[dimension]} + 1; }
};
static_assert(sizeof(TensorMapFields) <= 128);

}  // namespace resnet_fused::emulator
