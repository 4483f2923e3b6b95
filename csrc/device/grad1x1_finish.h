// What conv_bn_grad1x1 for sm_90a makes of x and of dx: h, which both products' left side is; the
// rounded gradient, masked by the BatchNorm and ReLU below, and its sums.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_act.h"
#include "grad1x1_sums.h"
#include "grad1x1_tma.h"
#include "pair.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T>
RF_DEVICE float half_of(uint32_t word, int half) {
  return widen(T{static_cast<uint16_t>(word >> (16 * half))});
}

// Adds to the sums of slice i what lies there of the addend.
template <class T, class Staged, int kCount>
RF_DEVICE void add_slice(float (&dx)[kCount], const Staged& addend, int i) {
  uint32_t words[4];
  addend.load(words, i);
#pragma unroll
  for (int e = 0; e < 8; ++e) dx[8 * i + e] += half_of<T>(words[e / 2], e % 2);
}

template <class T, class Shape>
class Grad1x1Finish {
  static constexpr int kSlices = Shape::kPixels / 16;
  using Staged = StagedTile<Orientation::kChannelsLeft, Shape::kPixels>;

 public:
  // A thread's two channels of a block: rows g and g + 8.
  struct Channels {
    float scale[2] = {};
    float shift[2] = {};
    float mean[2] = {};
  };

  // thread: of the warpgroup.
  RF_DEVICE Grad1x1Finish(const Grad1x1Arguments& told, int32_t first_channel, uint32_t thread)
      : told_(told), first_channel_(first_channel), thread_(thread) {}

  // Nothing more is read.
  static RF_DEVICE void prefetch(const Grad1x1Arguments& /*told*/) {}
  RF_DEVICE uint32_t bytes() const { return 0; }
  RF_DEVICE void ask(ptx::SharedAddress /*to*/, const int32_t (& /*at*/)[2],
                     ptx::SharedAddress /*barrier*/) const {}

  RF_DEVICE bool summed() const { return told_.norm != nullptr; }

  RF_DEVICE Channels load(int b) const {
    Channels found;
    if (!summed()) return found;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t c = first_channel_ + Grad1x1Sums<Shape>::channel_of(thread_, b, side);
      if (c >= told_.channels) continue;
      found.scale[side] = ptx::load_global_read_only(told_.norm + c);
      found.shift[side] = ptx::load_global_read_only(told_.norm + told_.channels + c);
      found.mean[side] = ptx::load_global_read_only(told_.norm + 2 * told_.channels + c);
    }
    return found;
  }

  // h of 64 channels, as the products take their left side.
  RF_DEVICE void turn(uint32_t (&h)[kSlices][4], int b, ptx::SharedAddress stage,
                      const Channels& channels, int32_t left) const {
    const Staged x(stage + Shape::kInputAt + b * Shape::kBoxBytes, thread_);
    const BnAct<float> op{0.0f};
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      x.load(h[i], i);
      if (!summed()) continue;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float scale = channels.scale[m % 2], shift = channels.shift[m % 2];
        h[i][m] = narrow_pair<T>(op(half_of<T>(h[i][m], 0), scale, shift),
                                 op(half_of<T>(h[i][m], 1), scale, shift));
      }
      if (left < Shape::kPixels) cut(h[i], i, left);
    }
  }

  // dx of 64 channels: added to, rounded, masked, put into the staging, and summed as it was
  // rounded.
  RF_DEVICE void put(float (&dx)[Shape::kPixels / 2], Grad1x1Sums<Shape>& sums, int b,
                     ptx::SharedAddress stage, ptx::SharedAddress staging, const Channels& channels,
                     int32_t left) const {
    const uint32_t box = b * Shape::kBoxBytes;
    const Staged x(stage + Shape::kInputAt + box, thread_);
    const Staged addend(stage + Shape::kAddendAt + box, thread_);
    const Staged out(staging + box, thread_);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      uint32_t words[4], raw[4];
      if (told_.addend != nullptr) add_slice<T>(dx, addend, i);
      if (summed()) {
        x.load(raw, i);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int side = e / 2 % 2;
          // As forward made it. Not (h > 0): where it is NaN, the gradient passes.
          const float h = widen(narrow<T>(__builtin_fmaf(
              channels.scale[side], half_of<T>(raw[e / 2], e % 2), channels.shift[side])));
          if (h <= 0.0f) dx[8 * i + e] = 0.0f;
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        words[m] = narrow_pair<T>(dx[8 * i + 2 * m], dx[8 * i + 2 * m + 1]);
      }
      out.store(i, words);
      if (!summed()) continue;
      if (left < Shape::kPixels) cut(words, i, left);
      sums.template add<T>(b, words, raw, channels.mean);
    }
  }

 private:
  // Zeros in the place of what lies behind the last pixel, in the words of slice i.
  RF_DEVICE void cut(uint32_t (&words)[4], int i, int32_t left) const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const auto pixel = static_cast<int32_t>(i * 16 + m / 2 * 8 + thread_ % 4 * 2);
      if (pixel + 1 >= left) words[m] &= 0x0000FFFFu;
      if (pixel >= left) words[m] = 0;
    }
  }

  const Grad1x1Arguments& told_;
  int32_t first_channel_;
  uint32_t thread_;
};

#endif

}  // namespace resnet_fused
