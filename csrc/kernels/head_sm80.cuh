// The head on the GPU, for sm_80 and later: average pooling, then the classifier.
//
//     mean = rnd(sum over h, w of x / (H W)),  out = rnd(mean @ weight.T + bias)
//
// Two kernels: every class needs every mean, so the second one goes on when all of the first have
// been stored, once; until then it may ask for its weights. The pooling is bound by memory: a warp
// sums up 64 channels of an image, four pixels at a time. The product reads what is left, a few
// megabytes of weights, straight into the fragments of mma.sync. In which order a reduction goes is
// free, as long as both operands agree: so a lane's 16 bytes of a row, eight neighbours, are its
// share of two instructions.
#pragma once

#include <cstdint>

#include "../device/dependent.h"
#include "../device/head_tile.h"
#include "../device/matrix_unit.h"
#include "../device/vector.h"

namespace resnet_fused {

// Eight channels of a pixel or a class, those that there are; kWide: by one load. kReadOnly: nobody
// writes there while the kernel runs, as the kernel ahead may do with activations.
template <class T, bool kWide, bool kReadOnly>
RF_DEVICE Vector<T> head_channels(const T* from, int64_t stride, int32_t left) {
  const auto load = [](const auto* at) {
    if constexpr (kReadOnly) {
      return ptx::load_global_read_only(at);
    } else {
      return ptx::load_global(at);
    }
  };
  Vector<T> found{};
  if constexpr (kWide) {
    if (left > 0) found = load(reinterpret_cast<const Vector<T>*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kVectorLength<T>; ++i) {
      if (i < left) found.lane[i] = load(from + i * stride);
    }
  }
  return found;
}

// Warps take images x groups of 64 channels; kWide: channels lie together in whole vectors.
template <class T, bool kWide>
__global__ void __launch_bounds__(kHeadMeanThreads)
    head_mean_kernel(const __grid_constant__ HeadArguments arguments) {
  constexpr int kLength = kVectorLength<T>;
  constexpr int kLanes = kHeadChannels / kLength;  // along the channels
  constexpr int kRows = 32 / kLanes;               // pixels that a warp reads at a time
  constexpr int kAhead = kWide ? 4 : 1;            // such, in flight
  const uint32_t lane = threadIdx.x % 32;
  // Of 31 bits, as the plan sees to: a 64-bit division would be a call.
  const uint32_t unit = blockIdx.x * (kHeadMeanThreads / 32) + threadIdx.x / 32;
  const uint32_t groups = static_cast<uint32_t>(arguments.pitch) / kHeadChannels;
  const auto image = static_cast<int32_t>(unit / groups);
  wait_for_ahead(arguments.dependent);
  if (image >= arguments.images) return;
  const int32_t channel = static_cast<int32_t>(unit % groups) * kHeadChannels +
                          static_cast<int32_t>(lane) % kLanes * kLength;
  const int32_t left = arguments.channels - channel;
  const T* from =
      static_cast<const T*>(arguments.x) + (image * arguments.x_n + channel * arguments.x_c);
  float sum[kLength] = {};
  for (int32_t first = static_cast<int32_t>(lane) / kLanes; first < arguments.pixels;
       first += kRows * kAhead) {
    Vector<T> found[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t pixel = first + i * kRows;
      const int64_t place =
          pixel / arguments.width * arguments.x_h + pixel % arguments.width * arguments.x_w;
      found[i] = head_channels<T, kWide, false>(from + place, arguments.x_c,
                                                pixel < arguments.pixels ? left : 0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int j = 0; j < kLength; ++j) sum[j] += widen(found[i].lane[j]);
    }
  }
  Vector<T> mean;
#pragma unroll
  for (int j = 0; j < kLength; ++j) {
#pragma unroll
    for (int apart = kLanes; apart < 32; apart *= 2) {
      sum[j] += ptx::shuffle_xor(ptx::kWholeWarp, sum[j], apart);
    }
    mean.lane[j] = narrow<T>(sum[j] / static_cast<float>(arguments.pixels));
  }
  if (lane < kLanes) {
    T* to = static_cast<T*>(arguments.mean) + static_cast<int64_t>(image) * arguments.pitch;
    store_vector(to + channel, mean);
  }
}

// Block (x, y): classes from kN x on of the images from kM y on. kWide: of the weights.
template <class T, class Shape, bool kWide>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    head_linear_kernel(const __grid_constant__ HeadArguments arguments) {
  constexpr int kTilesM = Shape::kTilesM;
  constexpr int kTilesN = Shape::kTilesN;
  using Words = Vector<uint32_t>;
  const uint32_t thread = threadIdx.x;
  const auto lane = static_cast<int32_t>(thread % 32);
  const auto warp = static_cast<int32_t>(thread / 32);
  const auto first_class = static_cast<int32_t>(blockIdx.x * Shape::kN);
  const auto first_image = static_cast<int32_t>(blockIdx.y * Shape::kM);
  const T* mean = static_cast<const T*>(arguments.mean);
  const T* weight = static_cast<const T*>(arguments.weight);

  prefetch_share(arguments.weight, arguments.prefetch_bytes);
  wait_for_ahead(arguments.dependent);

  // Steps; loads by element fill the registers of one.
  [[maybe_unused]] constexpr int kAhead = kWide ? 2 : 1;
  float sums[kTilesM][kTilesN][4] = {};
#pragma unroll kAhead
  for (int32_t at = warp * kHeadStep; at < arguments.pitch; at += Shape::kWarps * kHeadStep) {
    const int32_t channel = at + lane % 4 * kVectorLength<T>;
    Words left[kTilesM][2];
    Words right[kTilesN];
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int32_t image = first_image + i * 8 + lane / 4;
      const T* from = mean + (static_cast<int64_t>(image) * arguments.pitch + channel);
      left[i / 2][i % 2] = Words{};
      // The kernel before has written them: not by the read-only path.
      if (image < arguments.images) {
        left[i / 2][i % 2] = ptx::load_global(reinterpret_cast<const Words*>(from));
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int32_t label = first_class + j * 8 + lane / 4;
      const T* from = weight + (label * arguments.w_k + channel * arguments.w_c);
      right[j] = __builtin_bit_cast(
          Words,
          head_channels<T, kWide, true>(
              from, arguments.w_c, label < arguments.classes ? arguments.channels - channel : 0));
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const Words(&rows)[2] = left[i];
        const uint32_t a[4] = {rows[0].lane[step], rows[1].lane[step], rows[0].lane[step + 1],
                               rows[1].lane[step + 1]};
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
          multiply<T>(sums[i][j], a, {right[j].lane[step], right[j].lane[step + 1]});
        }
      }
    }
  }

  struct alignas(8) Two {
    float first;
    float second;
  };
  const ptx::SharedAddress parts = ptx::shared_address(ptx::dynamic_shared());
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int32_t place = (i * 8 + lane / 4) * Shape::kPitch + j * 8 + lane % 4 * 2;
      const float (&sum)[4] = sums[i / 2][j];
      ptx::store_shared(parts + warp * Shape::kPartBytes + place * 4,
                        Two{sum[i % 2 * 2], sum[i % 2 * 2 + 1]});
    }
  }
  ptx::sync_threads();
  // The warps' sums, in their order.
#pragma unroll 1
  for (uint32_t i = thread; i < Shape::kM * Shape::kN; i += Shape::kThreads) {
    const auto row = static_cast<int32_t>(i / Shape::kN);
    const auto column = static_cast<int32_t>(i % Shape::kN);
    const int32_t image = first_image + row;
    const int32_t label = first_class + column;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < Shape::kWarps; ++part) {
      sum += ptx::load_shared<float>(parts + part * Shape::kPartBytes +
                                     (row * Shape::kPitch + column) * 4);
    }
    if (image >= arguments.images || label >= arguments.classes) continue;
    if (arguments.bias != nullptr) {
      sum += widen(ptx::load_global_read_only(static_cast<const T*>(arguments.bias) + label));
    }
    T* out = static_cast<T*>(arguments.out) + static_cast<int64_t>(image) * arguments.classes;
    ptx::store_global(out + label, narrow<T>(sum));
  }
}

}  // namespace resnet_fused
