// bn_act_pool on the GPU, for sm_80 and later: BatchNorm, ReLU and max pooling in one pass.
//
//     out = max over a window of rnd(relu(fma(scale, y, shift))),  taps = which tap it was
//
// A thread takes channels of one window at a time: see device/channel_walk.h, whose pixels are the
// windows here. What neighbouring windows share comes from the caches.
#pragma once

#include "../device/channel_walker.h"
#include "../device/pool_windows.h"

namespace resnet_fused {

// Of a 3x3 kernel every tap is in flight at a time. Any other goes tap by tap.
enum class PoolKernel { kThree, kAny };

struct BnActPoolArguments {
  const float* norm;  // [4, C] scale, shift, mean, invstd
  PoolWindows pool;
};

// The largest of a window so far.
template <class T, int kWidth>
struct PoolBest {
  Lanes<T, kWidth> value;
  Lanes<uint8_t, kWidth> tap;
  float best[kWidth];

  RF_DEVICE PoolBest() : value{}, tap{} {
#pragma unroll
    for (float& one : best) one = -1.0f;  // below every ReLU's result
  }

  // PyTorch's rule, on the rounded values, of which rounding makes ties: the first largest one, and
  // the last NaN.
  RF_DEVICE void visit(const Lanes<T, kWidth>& y, uint8_t number, const float (&scale)[kWidth],
                       const float (&shift)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const BnAct<float> relu{0.0f};
      const T rounded = narrow<T>(relu(widen(y.lane[i]), scale[i], shift[i]));
      const float h = widen(rounded);
      if (h > best[i] || h != h) {
        best[i] = h;
        value.lane[i] = rounded;
        tap.lane[i] = number;
      }
    }
  }
};

template <class T, int kWidth, PoolKernel kKernel>
__global__ void __launch_bounds__(kWalkThreads, 2)
    bn_act_pool_kernel(const __grid_constant__ ChannelWalk walk,
                       const __grid_constant__ BnActPoolArguments arguments) {
  using Found = Lanes<T, kWidth>;
  const WalkPlace at = walk_place<kWidth>(walk);
  if (!at.inside) return;
  const PoolWindows& pool = arguments.pool;
  const WalkOperand &raw = walk.operand[kRaw], &result = walk.operand[kResult];
  const T* y = static_cast<const T*>(raw.data) + at.channel * raw.channel;  // [N, H, W] of them
  T* out = static_cast<T*>(result.data) + at.channel * result.channel;      // [N, P, Q]
  uint8_t* taps =
      static_cast<uint8_t*>(pool.taps.data) + at.channel * pool.taps.channel;  // [N, P, Q]
  float scale[kWidth], shift[kWidth];
  load_values(arguments.norm, at.channel, scale);
  load_values(arguments.norm + walk.channels, at.channel, shift);
  const int64_t stride = static_cast<int64_t>(blockDim.y) * walk.parts;
  for (int64_t window = static_cast<int64_t>(at.part) * blockDim.y + threadIdx.y;
       window < walk.pixels; window += stride) {
    const WalkPixel<false> place(walk, window);
    const int32_t top = static_cast<int32_t>(place.index[1]) * pool.step[0] - pool.padding[0];
    const int32_t left = static_cast<int32_t>(place.index[2]) * pool.step[1] - pool.padding[1];
    const auto exists = [&](int32_t row, int32_t column) {
      return row >= 0 && row < pool.size[0] && column >= 0 && column < pool.size[1];
    };
    const auto read = [&](int32_t row, int32_t column) {
      return ptx::load_global_read_only(
          reinterpret_cast<const Found*>(y + pool_place(raw, place.index[0], row, column)));
    };
    PoolBest<T, kWidth> found;
    if constexpr (kKernel == PoolKernel::kThree) {
      Found tap[9];
#pragma unroll
      for (int i = 0; i < 9; ++i) {
        tap[i] = Found{};
        if (exists(top + i / 3, left + i % 3)) tap[i] = read(top + i / 3, left + i % 3);
      }
#pragma unroll
      for (int i = 0; i < 9; ++i) {
        if (!exists(top + i / 3, left + i % 3)) continue;
        found.visit(tap[i], static_cast<uint8_t>(i), scale, shift);
      }
    } else {
      uint8_t number = 0;
      for (int32_t r = 0; r < pool.kernel[0]; ++r) {
        for (int32_t s = 0; s < pool.kernel[1]; ++s, ++number) {
          if (!exists(top + r, left + s)) continue;
          found.visit(read(top + r, left + s), number, scale, shift);
        }
      }
    }
    ptx::store_global(reinterpret_cast<Found*>(out + place.offset(result)), found.value);
    ptx::store_global(reinterpret_cast<Lanes<uint8_t, kWidth>*>(taps + place.offset(pool.taps)),
                      found.tap);
  }
}

}  // namespace resnet_fused
