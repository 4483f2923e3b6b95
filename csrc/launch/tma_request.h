// Tensor maps of activations and filters, a step of 128 bytes of channels a box. Inside of this
// room.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "../device/bn_act.h"
#include "../device/warpgroup_shape.h"
#include "conv_strides.h"
#include "e4m3_type.h"
#include "tensor_map.h"

namespace resnet_fused {

// Whether this build holds machine code for sm_90a.
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
constexpr bool kBuiltForSm90a = true;
#else
constexpr bool kBuiltForSm90a = false;
#endif

constexpr int64_t kTmaElementBytes = 2;  // of 16-bit types
// docs/numerics.md, "TF32": the bound is for operands that were rounded.
constexpr char kNoTf32[] =
    "dtype: float32 is not served here: nothing rounds to TF32 what wgmma would cut";
constexpr int64_t kTmaStrideBytes = 16;  // that strides are multiples of

// What a dtype is to TMA, to which e4m3 is bytes.
inline TensorElement element_of(int32_t dtype) {
  switch (dtype) {
    case kFloat8E4M3:
      return TensorElement::kUint8;
    case static_cast<int32_t>(DataType::kFloat16):
      return TensorElement::kFloat16;
    case static_cast<int32_t>(DataType::kFloat32):
      return TensorElement::kFloat32;
    default:
      return TensorElement::kBfloat16;
  }
}

inline int32_t step_elements(TensorElement element) {
  return narrowed(kStepRowBytes / element_bytes(element));
}

// Of a dimension of one element no stride is used; any lawful one will do.
inline int64_t stride_bytes(TensorElement element, int64_t size, int64_t stride) {
  return size > 1 ? stride * element_bytes(element) : kTmaStrideBytes;
}

// Boxes with rows of 128 bytes, or of `channels` where those are fewer. A plan may be asked for
// where there is no memory yet.
inline TensorMapRequest boxes_request(TensorElement element, const void* at,
                                      int32_t channels = kStepRowBytes) {
  TensorMapRequest request;
  request.element = element;
  request.address =
      at != nullptr ? const_cast<void*>(at) : reinterpret_cast<void*>(uintptr_t{kTileAlignment});
  request.box[0] = std::min(step_elements(element), channels);
  request.swizzle =
      request.box[0] == step_elements(element) ? TensorSwizzle::k128 : TensorSwizzle::k64;
  return request;
}

// A matrix of `rows` rows of `channels` channels, `stride` elements apart; boxes of `box` rows with
// `row` channels of each, or as many as are 128 bytes.
inline TensorMapRequest rows_request(TensorElement element, const void* at, int64_t channels,
                                     int64_t rows, int64_t stride, int32_t box,
                                     int32_t row = kStepRowBytes) {
  TensorMapRequest request = boxes_request(element, at, row);
  request.rank = 2;
  request.sizes = {channels, rows};
  request.strides = {stride_bytes(element, rows, stride)};
  request.box[1] = box;
  return request;
}

// [N, C, H, W] or [K, C, R, S] as {C, W, H, N}.
inline TensorMapRequest images_request(TensorElement element, const void* at,
                                       const int64_t (&size)[4], const int64_t (&stride)[4],
                                       int32_t channels = kStepRowBytes) {
  TensorMapRequest request = boxes_request(element, at, channels);
  request.rank = 4;
  request.sizes = {size[1], size[3], size[2], size[0]};
  request.strides = {stride_bytes(element, size[3], stride[3]),
                     stride_bytes(element, size[2], stride[2]),
                     stride_bytes(element, size[0], stride[0])};
  return request;
}

// So many filters of one tap [K, C, R, S].
inline TensorMapRequest taps_request(TensorElement element, const void* at,
                                     const int64_t (&size)[4], const int64_t (&stride)[4],
                                     int32_t filters, int32_t channels = kStepRowBytes) {
  TensorMapRequest request = images_request(element, at, size, stride, channels);
  request.box = {request.box[0], 1, 1, filters};
  return request;
}

// Image `first` of a tensor of so many; the stride of one image alone is not used.
inline const void* image_at(TensorElement element, const void* tensor, int64_t images,
                            int64_t stride, int64_t first) {
  return moved(tensor, images > 1 ? first * stride * element_bytes(element) : 0);
}

// Elements from one pixel of [N, C, H, W] to the next, where all of them lie one behind the other;
// of a single pixel a lawful number. element: bytes of one.
inline std::optional<int64_t> pixel_step(const int64_t (&size)[4], const int64_t (&stride)[4],
                                         int64_t element = kTmaElementBytes) {
  std::optional<int64_t> step;
  int64_t pixels = 1;
  for (const int d : {3, 2, 0}) {
    if (size[d] == 1) continue;
    if (!step) step = stride[d];
    if (stride[d] != *step * pixels) return std::nullopt;
    pixels *= size[d];
  }
  const int64_t bytes = divide_up(size[1] * element, kTmaStrideBytes) * kTmaStrideBytes;
  return step ? *step : bytes / element;
}

// A fault with the argument's name in front; empty where there is none.
inline std::string named(const char* argument, const std::string& fault) {
  return fault.empty() ? fault : std::string(argument) + ": " + fault;
}

}  // namespace resnet_fused
