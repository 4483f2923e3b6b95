// bn_act on the GPU, for sm_80 and later: one pass over memory, bound by its bandwidth.
//
// Both kernels take a BnActLoop. The vector kernel sees a matrix [rows, columns] whose rows lie
// along memory and moves 16 bytes an instruction; the channel is the column (NHWC) or the row
// (NCHW). The strided kernel takes anything else, an element a thread. Where the kernel ahead may
// not have ended they begin by waiting for it; `dependent`: the next one may begin early.
#pragma once

#include <cstdint>

#include "../device/bn_act.h"
#include "../device/dependent.h"
#include "../device/vector.h"

namespace resnet_fused {

enum class ChannelAxis { kColumn, kRow };

constexpr int kBnActThreads = 256;
constexpr int kBnActRows = 4;  // rows a thread has in flight: 4 x 16 bytes hide the latency

// A matrix with rows along memory; columns counts vectors, the row strides count elements.
struct BnActMatrix {
  int64_t rows;
  int64_t columns;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  int64_t out_row_stride;
  int64_t channels;
};

template <class C>
RF_DEVICE BnAct<C> bn_act_op(bool relu) {
  return BnAct<C>{relu ? C(0) : -C(__builtin_huge_val())};
}

template <class T, bool kResidual, class C>
RF_DEVICE Vector<T> bn_act_vector(const Vector<T>& x, const Vector<T>& residual,
                                  const C (&scale)[kVectorLength<T>],
                                  const C (&shift)[kVectorLength<T>], BnAct<C> op) {
  Vector<T> y;
#pragma unroll
  for (int i = 0; i < kVectorLength<T>; ++i) {
    if constexpr (kResidual) {
      y.lane[i] = narrow<T>(op(widen(x.lane[i]), scale[i], shift[i], widen(residual.lane[i])));
    } else {
      y.lane[i] = narrow<T>(op(widen(x.lane[i]), scale[i], shift[i]));
    }
  }
  return y;
}

// One value for each lane of a vector, 16 bytes at a time.
template <class C, int kLength>
RF_DEVICE void load_channels(const C* table, C (&values)[kLength] RF_SITE_PARAMETER) {
#pragma unroll
  for (int i = 0; i < kLength; i += kVectorLength<C>) {
    const Vector<C> part = load_vector(table + i RF_SITE);
#pragma unroll
    for (int j = 0; j < kVectorLength<C>; ++j) values[i + j] = part.lane[j];
  }
}

// One thread's share of a tile: kBnActRows rows, blockDim.y apart, at one column.
// All loads come first, so that they are in flight together.
template <class T, bool kResidual, ChannelAxis kAxis>
RF_DEVICE void bn_act_tile(const BnActLoop& loop, const BnActMatrix& matrix, int64_t row0,
                           int64_t column) {
  using C = Compute<T>;
  constexpr int kLength = kVectorLength<T>;
  const T* x = static_cast<const T*>(loop.x) + column * kLength;                // [rows, columns]
  const T* residual = static_cast<const T*>(loop.residual) + column * kLength;  // [rows, columns]
  T* out = static_cast<T*>(loop.out) + column * kLength;                        // [rows, columns]
  const C* scale_table = static_cast<const C*>(loop.scale);                     // [C]
  const C* shift_table = static_cast<const C*>(loop.shift);                     // [C]

  // Before the loads: a 64-bit division is a call, which little should be kept across.
  int64_t channel = kAxis == ChannelAxis::kRow ? row0 % matrix.channels : 0;
  const int64_t channel_step = kAxis == ChannelAxis::kRow ? blockDim.y % matrix.channels : 0;

  Vector<T> x_vector[kBnActRows];
  Vector<T> residual_vector[kBnActRows];
#pragma unroll
  for (int i = 0; i < kBnActRows; ++i) {
    const int64_t row = row0 + i * static_cast<int>(blockDim.y);
    if (row < matrix.rows) {
      // Not by the path for what nobody writes: the kernel ahead may have written it meanwhile.
      const auto vector = [](const T* at) {
        return ptx::load_global(reinterpret_cast<const Vector<T>*>(at));
      };
      x_vector[i] = vector(x + row * matrix.x_row_stride);
      if constexpr (kResidual) {
        residual_vector[i] = vector(residual + row * matrix.residual_row_stride);
      }
    }
  }
  C scale[kLength];
  C shift[kLength];
  if constexpr (kAxis == ChannelAxis::kColumn) {
    load_channels(scale_table + column * kLength, scale);
    load_channels(shift_table + column * kLength, shift);
  }
  const BnAct<C> op = bn_act_op<C>(loop.relu);
#pragma unroll
  for (int i = 0; i < kBnActRows; ++i) {
    const int64_t row = row0 + i * static_cast<int>(blockDim.y);
    if (row >= matrix.rows) break;
    if constexpr (kAxis == ChannelAxis::kRow) {
      const C row_scale = ptx::load_global_read_only(scale_table + channel);
      const C row_shift = ptx::load_global_read_only(shift_table + channel);
#pragma unroll
      for (int j = 0; j < kLength; ++j) {
        scale[j] = row_scale;
        shift[j] = row_shift;
      }
      channel += channel_step;
      if (channel >= matrix.channels) channel -= matrix.channels;
    }
    store_vector(out + row * matrix.out_row_stride,
                 bn_act_vector<T, kResidual>(x_vector[i], residual_vector[i], scale, shift, op));
  }
}

// Block (x, y) starts at row tile x and column tile y; both go on in steps of the grid, so no
// limit of the grid limits the tensor.
template <class T, bool kResidual, ChannelAxis kAxis>
__global__ void __launch_bounds__(kBnActThreads)
    bn_act_vector_kernel(const __grid_constant__ BnActLoop loop,
                         const __grid_constant__ BnActMatrix matrix, bool dependent) {
  const int64_t tile_rows = static_cast<int64_t>(blockDim.y) * kBnActRows;
  const int64_t row_step = tile_rows * gridDim.x;
  const int64_t column_step = static_cast<int64_t>(blockDim.x) * gridDim.y;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  wait_for_ahead(dependent);
  for (int64_t row = blockIdx.x * tile_rows + threadIdx.y; row < matrix.rows; row += row_step) {
    for (int64_t column = first_column; column < matrix.columns; column += column_step) {
      bn_act_tile<T, kResidual, kAxis>(loop, matrix, row, column);
    }
  }
}

template <class T, bool kResidual>
__global__ void __launch_bounds__(kBnActThreads)
    bn_act_strided_kernel(const __grid_constant__ BnActLoop loop, bool dependent) {
  using C = Compute<T>;
  const T* x = static_cast<const T*>(loop.x);                // any strides
  const T* residual = static_cast<const T*>(loop.residual);  // any strides
  T* out = static_cast<T*>(loop.out);                        // any strides
  const C* scale_table = static_cast<const C*>(loop.scale);  // [C]
  const C* shift_table = static_cast<const C*>(loop.shift);  // [C]
  const BnAct<C> op = bn_act_op<C>(loop.relu);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBnActThreads;
  wait_for_ahead(dependent);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBnActThreads + threadIdx.x;
       i < loop.elements; i += step) {
    int64_t rest = i;
    int64_t x_offset = 0;
    int64_t residual_offset = 0;
    int64_t out_offset = 0;
    int64_t channel = 0;
#pragma unroll
    for (int d = kLoopDims - 1; d >= 0; --d) {
      const int64_t next = d > 0 ? rest / loop.size[d] : 0;
      const int64_t index = rest - next * loop.size[d];
      rest = next;
      x_offset += index * loop.x_stride[d];
      out_offset += index * loop.out_stride[d];
      channel += index * loop.channel_stride[d];
      if constexpr (kResidual) residual_offset += index * loop.residual_stride[d];
    }
    const C scale = ptx::load_global_read_only(scale_table + channel);
    const C shift = ptx::load_global_read_only(shift_table + channel);
    const C value = widen(ptx::load_global(x + x_offset));
    T y;
    if constexpr (kResidual) {
      const T shortcut = ptx::load_global(residual + residual_offset);
      y = narrow<T>(op(value, scale, shift, widen(shortcut)));
    } else {
      y = narrow<T>(op(value, scale, shift));
    }
    ptx::store_global(out + out_offset, y);
  }
}

}  // namespace resnet_fused
