// Makes tensor maps: what TMA has to know of a tensor and its boxes. On a GPU the driver encodes
// them, in the emulator this does; the rules are checked here first, so that what is wrong has a
// name. Rules: CUDA Driver API, Tensor Map Object Management, cuTensorMapEncodeTiled and
// cuTensorMapEncodeIm2col.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../ptx/tensor_map.h"

namespace resnet_fused {

constexpr int kMostDimensions = 5;

// kTfloat32: float32 in memory, of which a load brings each number rounded to TF32, to the nearest,
// ties to even. What CUDA's manuals leave open: the conformance program asks it of a GPU.
enum class TensorElement : uint8_t { kUint8, kUint32, kFloat16, kBfloat16, kFloat32, kTfloat32 };

int64_t element_bytes(TensorElement element);

// Without a swizzle, or 16-byte units change places within spans of 32, 64 or 128 bytes.
enum class TensorSwizzle : uint8_t { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// A tensor and a box of it, innermost dimension first. With `pixels` the map is for im2col loads:
// dimensions {C, W, H, N} (or without H, or with D behind it), box[0] channels of each pixel.
struct TensorMapRequest {
  TensorElement element = TensorElement::kBfloat16;
  int rank = 0;                                        // 1 to 5; im2col 3 to 5
  void* address = nullptr;                             // a multiple of 16
  std::array<int64_t, kMostDimensions> sizes{};        // elements, 1 to 2^32
  std::array<int64_t, kMostDimensions - 1> strides{};  // bytes, of the dimensions behind the first
  std::array<int32_t, kMostDimensions> box{};          // elements, 1 to 256
  std::array<int32_t, kMostDimensions> steps{1, 1, 1, 1, 1};  // element strides, 1 to 8; not of C
  TensorSwizzle swizzle = TensorSwizzle::kNone;
  int32_t pixels = 0;  // of a column, 1 to 1024; 0: no im2col
  // From the tensor's first pixel, and from its last, to the first and last that a filter's first
  // tap sees: {W, H, D}.
  std::array<int32_t, kMostDimensions - 2> lower{};
  std::array<int32_t, kMostDimensions - 2> upper{};
};

// Bytes that a load brings: what the mbarrier has to expect.
int64_t box_bytes(const TensorMapRequest& request);

// What is wrong with a request, with the argument's name, what was given and what is accepted;
// empty if nothing is. The driver takes some that this refuses: a swizzle of a box whose rows are
// shorter than its span, of which no manual says where they lie.
std::string tensor_map_fault(const TensorMapRequest& request);

// Encodes it; 0, or a cudaError_t: cudaErrorInvalidValue where tensor_map_fault has an answer, or
// the driver's own.
int encode_tensor_map(const TensorMapRequest& request, ptx::TensorMap* map);

}  // namespace resnet_fused
