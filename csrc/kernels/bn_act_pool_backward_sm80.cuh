// bn_act_pool_backward on the GPU, for sm_80 and later: what the windows give back to each pixel,
// ReLU's mask and BatchNorm's reductions in one pass.
//
//     dh = sum of dout over the windows whose winner the pixel was,
//     dz = rnd(dh) where relu(fma(scale, y, shift)) > 0 or is NaN, else 0;  sums of dz, dz (y -
//     mean)
//
// Each pixel gathers from the windows that it lies in, in their order: nothing is added by atomics.
#pragma once

#include "../device/channel_sums.h"
#include "../device/pool_windows.h"

namespace resnet_fused {

struct BnActPoolBackwardArguments {
  const float* norm;  // [4, C] scale, shift, mean, invstd
  PoolWindows pool;
  ChannelSums sums;
};

// The windows that a pixel lies in, along one dimension: [first, last).
struct WindowsOfPixel {
  int32_t place;  // in the padded image
  int32_t first;
  int32_t last;

  RF_DEVICE WindowsOfPixel(const PoolWindows& pool, int d, int64_t pixel)
      : place(static_cast<int32_t>(pixel) + pool.padding[d]) {
    const int32_t before = place - pool.kernel[d] + 1;
    first = before <= 0 ? 0 : (before + pool.step[d] - 1) / pool.step[d];
    last = place / pool.step[d] + 1;
    if (last > pool.windows[d]) last = pool.windows[d];
  }
};

// Two windows of a row are in flight at a time.
template <class T, int kWidth>
struct PoolGather {
  using Found = Lanes<T, kWidth>;
  using Taps = Lanes<uint8_t, kWidth>;
  const PoolWindows& pool;
  const WalkOperand& gradient;
  const T* dout;
  const uint8_t* taps;

  RF_DEVICE void load(int64_t image, int32_t p, int32_t q, Found& g, Taps& tap) const {
    g = ptx::load_global_read_only(
        reinterpret_cast<const Found*>(dout + pool_place(gradient, image, p, q)));
    tap = ptx::load_global_read_only(
        reinterpret_cast<const Taps*>(taps + pool_place(pool.taps, image, p, q)));
  }

  static RF_DEVICE void add(const Found& g, const Taps& tap, int32_t number, float (&sum)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum[i] += tap.lane[i] == number ? widen(g.lane[i]) : 0.0f;
    }
  }

  // What a pixel gets.
  RF_DEVICE void gather(int64_t image, const WindowsOfPixel& down, const WindowsOfPixel& along,
                        float (&sum)[kWidth]) const {
    const auto number = [&](int32_t p, int32_t q) {
      const int32_t r = down.place - p * pool.step[0], s = along.place - q * pool.step[1];
      return r * pool.kernel[1] + s;
    };
    constexpr int kTogether = 2;
#pragma unroll 1
    for (int32_t p = down.first; p < down.last; ++p) {
#pragma unroll 1
      for (int32_t first = along.first; first < along.last; first += kTogether) {
        Found g[kTogether];
        Taps tap[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + i < along.last) load(image, p, first + i, g[i], tap[i]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + i < along.last) add(g[i], tap[i], number(p, first + i), sum);
        }
      }
    }
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kWalkThreads, 2)
    bn_act_pool_backward_kernel(const __grid_constant__ ChannelWalk walk,
                                const __grid_constant__ BnActPoolBackwardArguments arguments) {
  using Found = Lanes<T, kWidth>;
  const WalkPlace at = walk_place<kWidth>(walk);
  const PoolWindows& pool = arguments.pool;
  const WalkOperand &raw = walk.operand[kRaw], &result = walk.operand[kResult];
  const WalkOperand& gradient = walk.operand[kGradient];
  const PoolGather<T, kWidth> windows{
      pool, gradient, static_cast<const T*>(gradient.data) + at.channel * gradient.channel,
      static_cast<const uint8_t*>(pool.taps.data) + at.channel * pool.taps.channel};
  const T* y = static_cast<const T*>(raw.data) + at.channel * raw.channel;  // [N, H, W] of them
  T* dz = static_cast<T*>(result.data) + at.channel * result.channel;       // [N, H, W]
  float scale[kWidth] = {}, shift[kWidth] = {}, mean[kWidth] = {};
  float sum[2][kWidth] = {};
  if (at.inside) {
    load_values(arguments.norm, at.channel, scale);
    load_values(arguments.norm + walk.channels, at.channel, shift);
    load_values(arguments.norm + 2 * walk.channels, at.channel, mean);
  }
  const int64_t stride = static_cast<int64_t>(blockDim.y) * walk.parts;
  int64_t pixel = static_cast<int64_t>(at.part) * blockDim.y + threadIdx.y;
  for (; at.inside && pixel < walk.pixels; pixel += stride) {
    const WalkPixel<false> place(walk, pixel);
    const auto value =
        ptx::load_global_read_only(reinterpret_cast<const Found*>(y + place.offset(raw)));
    const WindowsOfPixel down(pool, 0, place.index[1]), along(pool, 1, place.index[2]);
    float dh[kWidth] = {};
    windows.gather(place.index[0], down, along, dh);
    Found stored;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float v = widen(value.lane[i]);
      const float h = widen(narrow<T>(__builtin_fmaf(scale[i], v, shift[i])));
      // Not (h > 0): where it is NaN, the gradient passes. The sums are of what is stored.
      stored.lane[i] = narrow<T>(h <= 0.0f ? 0.0f : dh[i]);
      const float d = widen(stored.lane[i]);
      sum[0][i] += d;
      sum[1][i] = __builtin_fmaf(d, v - mean[i], sum[1][i]);
    }
    ptx::store_global(reinterpret_cast<Found*>(dz + place.offset(result)), stored);
  }
  merge_sums<2, kWidth>(sum, walk, at, arguments.sums);
}

}  // namespace resnet_fused
