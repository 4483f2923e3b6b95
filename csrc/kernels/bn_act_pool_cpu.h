// maxpool(relu(scale * y + shift)) on the CPU, and the gradient's way back through the windows.
//
// PyTorch's rule among the rounded values: the first maximum in the window's order, the last NaN.
// Backward gathers: a pixel adds the windows that it won in their own order, and nobody else writes
// to it.
#pragma once

#include "bn_training_tiles_cpu.h"

RF_NAMESPACE_BEGIN

namespace cpu {

constexpr int64_t kPoolLanes = 256;

// One tap of `n` windows side by side: channels of one window, or one channel's windows in a row.
template <class T, bool kUnit, bool kInside>
void pool_tap(const T* y, int64_t step, int64_t n, Along<Compute<T>, kInside> scale,
              Along<Compute<T>, kInside> shift, int32_t tap, Compute<T>* RF_RESTRICT best,
              int32_t* RF_RESTRICT winner) {
  using C = Compute<T>;
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const C z = multiply_add(scale[i], widen(y[kUnit ? i : i * step]), shift[i]);
    const C h = widen(narrow<T>(C(0) > z ? C(0) : z));
    // Selects, one after the other: of (h > best || h is NaN) GCC makes no vectors.
    const C held = best[i];
    const int32_t holder = winner[i];
    const C larger_one = h > held ? h : held;
    const int32_t larger_tap = h > held ? tap : holder;
    best[i] = h != h ? h : larger_one;
    winner[i] = h != h ? tap : larger_tap;
  }
}

// Windows [first, first + n) of a row of windows, or channels of one window.
struct PoolRun {
  int64_t image, row, column, channel, n;
};

template <class T, bool kInside>
void pool_run(const BnTrainingCall& call, const PoolRun& run) {
  using C = Compute<T>;
  const BnTrainingPool& pool = call.pool;
  const BnTrainingOperand &raw = call.operand[kRaw], &result = call.operand[kResult];
  const C* scale = static_cast<const C*>(call.norm) + run.channel;
  const C* shift = scale + call.size[1];
  const T* y =
      static_cast<const T*>(raw.data) + run.image * raw.stride[0] + run.channel * raw.stride[1];
  C best[kPoolLanes];
  int32_t winner[kPoolLanes];
  for (int64_t i = 0; i < run.n; ++i) {
    best[i] = -C(__builtin_huge_val());  // what passes a ReLU is more: each window has a winner
    winner[i] = 0;
  }
  const int64_t top = run.row * pool.step[0] - pool.padding[0];
  for (int64_t r = 0; r < pool.kernel[0]; ++r) {
    if (top + r < 0 || top + r >= call.size[2]) continue;
    for (int64_t s = 0; s < pool.kernel[1]; ++s) {
      const int32_t tap = static_cast<int32_t>(r * pool.kernel[1] + s);
      int64_t left = run.column * pool.step[1] - pool.padding[1] + s;
      const T* row = y + (top + r) * raw.stride[2];
      if constexpr (kInside) {
        if (left < 0 || left >= call.size[3]) continue;
        pool_tap<T, true, true>(row + left * raw.stride[3], 1, run.n, {scale, 0}, {shift, 0}, tap,
                                best, winner);
      } else {
        // Those of the windows whose tap lies inside the image.
        int64_t first = 0;
        for (; first < run.n && left < 0; ++first) left += pool.step[1];
        const int64_t room = call.size[3] - left;
        const int64_t fitting = room <= 0 ? 0 : (room - 1) / pool.step[1] + 1;
        const int64_t n = smaller(run.n - first, fitting);
        pool_tap<T, false, false>(row + left * raw.stride[3], pool.step[1] * raw.stride[3], n,
                                  {scale, 0}, {shift, 0}, tap, best + first, winner + first);
      }
    }
  }
  const int64_t lane = kInside ? 1 : 3;
  T* out = static_cast<T*>(result.data) + run.image * result.stride[0] +
           run.channel * result.stride[1] + run.row * result.stride[2] +
           run.column * result.stride[3];
  uint8_t* taps = pool.taps + run.image * pool.taps_stride[0] + run.channel * pool.taps_stride[1] +
                  run.row * pool.taps_stride[2] + run.column * pool.taps_stride[3];
  for (int64_t i = 0; i < run.n; ++i) {
    out[i * result.stride[lane]] = narrow<T>(best[i]);  // exact
    taps[i * pool.taps_stride[lane]] = static_cast<uint8_t>(winner[i]);
  }
}

// A row of windows: of one image, with its channels where they lie inside, else of one channel.
template <class T, bool kInside>
void pool_row(const BnTrainingCall& call, int64_t task) {
  const BnTrainingPool& pool = call.pool;
  PoolRun run{};
  run.row = task % pool.windows[0];
  run.image = task / pool.windows[0];
  if constexpr (kInside) {
    for (; run.column < pool.windows[1]; ++run.column) {
      for (run.channel = 0; run.channel < call.size[1]; run.channel += kPoolLanes) {
        run.n = smaller(kPoolLanes, call.size[1] - run.channel);
        pool_run<T, true>(call, run);
      }
    }
  } else {
    run.channel = run.image % call.size[1];
    run.image /= call.size[1];
    for (; run.column < pool.windows[1]; run.column += kPoolLanes) {
      run.n = smaller(kPoolLanes, pool.windows[1] - run.column);
      pool_run<T, false>(call, run);
    }
  }
}

// What comes from one window to the pixel that is its tap number `tap`, for `n` channels.
template <class T, bool kUnit>
void add_window(const T* gradient, int64_t step, const uint8_t* taps, int64_t taps_step,
                uint8_t tap, int64_t n, Compute<T>* RF_RESTRICT sum) {
  using C = Compute<T>;
  RF_INDEPENDENT
  for (int64_t c = 0; c < n; ++c) {
    const C g = widen(gradient[kUnit ? c : c * step]);
    sum[c] += taps[kUnit ? c : c * taps_step] == tap ? g : C(0);
  }
}

// The first and the last window (one past it) that hold a pixel, along one dimension.
struct WindowRange {
  WindowRange(const BnTrainingPool& pool, int d, int64_t pixel) {
    const int64_t place = pixel + pool.padding[d];  // in the padded image
    const int64_t before = place - pool.kernel[d] + 1;
    first = before <= 0 ? 0 : (before + pool.step[d] - 1) / pool.step[d];
    last = smaller(place / pool.step[d] + 1, pool.windows[d]);
  }

  int64_t first, last;
};

// The same for one channel and the windows of a row side by side: a tap's pixels are `apart`.
template <class T>
void add_windows(const T* gradient, int64_t step, const uint8_t* taps, int64_t taps_step,
                 uint8_t tap, int64_t n, Compute<T>* RF_RESTRICT sum, int64_t apart) {
  using C = Compute<T>;
  RF_INDEPENDENT
  for (int64_t q = 0; q < n; ++q) {
    const C g = widen(gradient[q * step]);
    sum[q * apart] += taps[q * taps_step] == tap ? g : C(0);
  }
}

// gather_windows where the tile's columns are pixels: row by row of the image, tap by tap.
template <class T>
void gather_rows(const BnTrainingCall& call, const Tile& tile, T* buffer) {
  using C = Compute<T>;
  const BnTrainingPool& pool = call.pool;
  const int64_t (&stride)[4] = call.operand[kGradient].stride;
  const int64_t (&taps_stride)[4] = pool.taps_stride;
  const T* gradient = static_cast<const T*>(call.operand[kGradient].data) + tile.image * stride[0] +
                      tile.channel * stride[1];
  const uint8_t* taps = pool.taps + tile.image * taps_stride[0] + tile.channel * taps_stride[1];
  const int64_t step = pool.step[1], elements = tile.channels * tile.pixels;
  C sum[kPackedTile];
  for (int64_t i = 0; i < elements; ++i) sum[i] = C(0);
  for (int64_t done = 0, length; done < tile.pixels; done += length) {
    const int64_t row = (tile.pixel + done) / call.size[3];
    const int64_t left = (tile.pixel + done) % call.size[3];
    length = smaller(call.size[3] - left, tile.pixels - done);
    const WindowRange rows(pool, 0, row);
    for (int64_t p = rows.first; p < rows.last; ++p) {
      const int64_t r = row + pool.padding[0] - p * pool.step[0];
      // From the last tap to the first: a pixel then adds its windows in their own order.
      for (int64_t s = pool.kernel[1] - 1; s >= 0; --s) {
        const int64_t begin = left + pool.padding[1] - s, end = begin + length;
        if (end <= 0) continue;
        const int64_t first = begin <= 0 ? 0 : (begin + step - 1) / step;
        const int64_t n = smaller((end - 1) / step + 1, pool.windows[1]) - first;
        const uint8_t tap = static_cast<uint8_t>(r * pool.kernel[1] + s);
        for (int64_t c = 0; c < tile.channels; ++c) {
          add_windows(gradient + c * stride[1] + p * stride[2] + first * stride[3], stride[3],
                      taps + c * taps_stride[1] + p * taps_stride[2] + first * taps_stride[3],
                      taps_stride[3], tap, n, sum + c * tile.pixels + done + first * step - begin,
                      step);
        }
      }
    }
  }
  for (int64_t i = 0; i < elements; ++i) buffer[i] = narrow<T>(sum[i]);
}

// The gradient of the pooled-over activation: a tile of it, rounded, into a buffer.
template <class T>
void gather_windows(const BnTrainingCall& call, const Tile& tile, T* buffer) {
  if (!call.tiles.channels_inside) return gather_rows(call, tile, buffer);
  using C = Compute<T>;
  const BnTrainingPool& pool = call.pool;
  const int64_t (&stride)[4] = call.operand[kGradient].stride;
  const int64_t (&taps_stride)[4] = pool.taps_stride;
  const bool unit = stride[1] == 1 && taps_stride[1] == 1;
  const BufferStride to(call, tile);
  C sum[kLongestGroup];
  Pixels at(call, tile);
  for (int64_t i = 0; i < tile.pixels; ++i, at.next()) {
    const T* gradient = static_cast<const T*>(call.operand[kGradient].data) + at.n * stride[0] +
                        tile.channel * stride[1];
    const uint8_t* taps = pool.taps + at.n * taps_stride[0] + tile.channel * taps_stride[1];
    for (int64_t c = 0; c < tile.channels; ++c) sum[c] = C(0);
    const WindowRange rows(pool, 0, at.p), columns(pool, 1, at.q);
    for (int64_t p = rows.first; p < rows.last; ++p) {
      for (int64_t q = columns.first; q < columns.last; ++q) {
        const int64_t r = at.p + pool.padding[0] - p * pool.step[0];
        const int64_t s = at.q + pool.padding[1] - q * pool.step[1];
        const uint8_t tap = static_cast<uint8_t>(r * pool.kernel[1] + s);
        const T* g = gradient + p * stride[2] + q * stride[3];
        const uint8_t* t = taps + p * taps_stride[2] + q * taps_stride[3];
        if (unit) {
          add_window<T, true>(g, 1, t, 1, tap, tile.channels, sum);
        } else {
          add_window<T, false>(g, stride[1], t, taps_stride[1], tap, tile.channels, sum);
        }
      }
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      buffer[i * to.pixel + c * to.channel] = narrow<T>(sum[c]);
    }
  }
}

}  // namespace cpu

RF_NAMESPACE_END
