// Tensor maps of activations and filters, a step of 128 bytes of channels a box. Inside of this
// room.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../device/bn_act.h"
#include "../device/warpgroup_shape.h"
#include "conv_strides.h"
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
    "dtype: float32 is not served, as wgmma cuts to TF32 what mma.sync is given rounded";
constexpr int64_t kTmaStrideBytes = 16;  // that strides are multiples of

// A matrix of `rows` rows of `channels` channels, `stride` elements apart; boxes of 64 channels of
// `box` rows. A plan may be asked for where there is no memory yet.
inline TensorMapRequest rows_request(int32_t dtype, const void* at, int64_t channels, int64_t rows,
                                     int64_t stride, int32_t box) {
  TensorMapRequest request;
  request.element = static_cast<DataType>(dtype) == DataType::kFloat16 ? TensorElement::kFloat16
                                                                       : TensorElement::kBfloat16;
  request.rank = 2;
  request.address =
      at != nullptr ? const_cast<void*>(at) : reinterpret_cast<void*>(uintptr_t{kTileAlignment});
  request.sizes = {channels, rows};
  // Of a single row no stride is used; any lawful one will do.
  request.strides = {rows > 1 ? stride * kTmaElementBytes : kTmaStrideBytes};
  request.box = {kStepElements, box};
  request.swizzle = TensorSwizzle::k128;
  return request;
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
