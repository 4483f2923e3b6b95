// Sizes, strides and widths of accesses: what the arguments of all convolutions are worked out
// from. Inside of this room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../device/bn_act.h"
#include "../device/conv_geometry.h"
#include "../device/tile_shape.h"

namespace resnet_fused {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(int32_t dtype) {
  return static_cast<DataType>(dtype) == DataType::kFloat32 ? 4 : 2;
}

inline int32_t narrowed(int64_t value) { return static_cast<int32_t>(value); }

// Output rows and columns of a problem: [P, Q]. Problem: RfConvBnAct or RfConvGradient.
struct OutputSize {
  int64_t p;
  int64_t q;
};
template <class Problem>
OutputSize output_size(const Problem& problem) {
  const auto along = [&](int d) {
    const int64_t reach = problem.dilation[d] * (problem.weight_size[2 + d] - 1) + 1;
    const int64_t room = problem.x_size[2 + d] + 2 * problem.padding[d] - reach;
    return room < 0 ? 0 : room / problem.stride[d] + 1;
  };
  return OutputSize{along(0), along(1)};
}

// Strides of dimensions of size 1 mean nothing, and could be any number; none is used.
struct Strides {
  int64_t n;
  int64_t c;
  int64_t h;
  int64_t w;

  PixelStrides of_pixels() const { return {n, c, h, w}; }
};
inline Strides used(const int64_t (&size)[4], const int64_t (&stride)[4]) {
  const auto one = [&](int d) { return size[d] > 1 ? stride[d] : 0; };
  return Strides{one(0), size[1] > 1 ? stride[1] : 1, one(2), one(3)};
}

// Bytes of a tensor that fills its memory from the first to the last element; 0 of any other.
template <size_t kDims>
int64_t dense_bytes(const int64_t (&size)[kDims], const int64_t (&stride)[kDims], int64_t bytes) {
  int64_t elements = 1;
  int64_t reach = 1;
  for (size_t d = 0; d < kDims; ++d) {
    elements *= size[d];
    reach += (size[d] - 1) * stride[d];
  }
  return reach == elements ? elements * bytes : 0;
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0;
}

// Whether whole aligned chunks of 16 bytes can be moved: neighbours along the channels, of which
// each group has `channels`.
inline bool is_wide(const void* pointer, const Strides& strides, int64_t channels, int64_t bytes) {
  const int64_t unit = kChunkBytes / bytes;
  return is_aligned(pointer) && strides.c == 1 && channels % unit == 0 && strides.n % unit == 0 &&
         strides.h % unit == 0 && strides.w % unit == 0;
}

// `bytes` further; an absent tensor stays absent.
template <class T>
T* moved(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<T*>(static_cast<Byte*>(pointer) + bytes);
}

// A launch for each dtype that there is.
template <class Arguments>
struct Launches {
  int (*bfloat16)(const Arguments&, int configuration, void* stream);
  int (*float16)(const Arguments&, int configuration, void* stream);
  int (*float32)(const Arguments&, int configuration, void* stream);

  int operator()(int32_t dtype, const Arguments& arguments, int configuration, void* stream) const {
    switch (static_cast<DataType>(dtype)) {
      case DataType::kBFloat16:
        return bfloat16(arguments, configuration, stream);
      case DataType::kFloat16:
        return float16(arguments, configuration, stream);
      default:
        return float32(arguments, configuration, stream);
    }
  }
};

}  // namespace resnet_fused
