// What conv_bn_grad1x1_end for sm_90a makes of its step, in the place of what Grad1x1Finish does.
//
// x is `out`, the end of the block before: as it lies it is the products' left side, and its sign
// the mask. The sums are against that block's last raw output, and behind a projection against the
// projection's, which come with the step.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "grad1x1_finish.h"
#include "passed_pair.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
class Grad1x1EndFinish {
  static constexpr int kSlices = Shape::kPixels / 16;
  using Staged = StagedTile<Orientation::kChannelsLeft, Shape::kPixels>;

 public:
  // A thread's two channels of a block: rows g and g + 8.
  struct Channels {
    float mean[2] = {};
    float residual_mean[2] = {};
  };

  // thread: of the warpgroup.
  RF_DEVICE Grad1x1EndFinish(const Grad1x1EndTmaArguments& told, int32_t first_channel,
                             uint32_t thread)
      : told_(told), first_channel_(first_channel), thread_(thread) {}

  static RF_DEVICE void prefetch(const Grad1x1EndTmaArguments& told) {
    ptx::tma_prefetch(&told.raw);
    if (told.projected) ptx::tma_prefetch(&told.residual);
  }
  // Of a step, beside what Grad1x1Finish reads.
  RF_DEVICE uint32_t bytes() const { return Shape::kInputBytes * (told_.projected ? 2 : 1); }
  RF_DEVICE void ask(ptx::SharedAddress to, const int32_t (&at)[2],
                     ptx::SharedAddress barrier) const {
    ptx::tma_load(to + Shape::kRawAt, &told_.raw, at, barrier);
    if (told_.projected) ptx::tma_load(to + Shape::kResidualAt, &told_.residual, at, barrier);
  }

  RF_DEVICE bool summed() const { return true; }

  RF_DEVICE Channels load(int b) const {
    Channels found;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t c = first_channel_ + Grad1x1Sums<Shape>::channel_of(thread_, b, side);
      if (c >= told_.image.shared.channels) continue;
      found.mean[side] = ptx::load_global_read_only(told_.mean + c);
      if (!told_.projected) continue;
      found.residual_mean[side] = ptx::load_global_read_only(told_.residual_mean + c);
    }
    return found;
  }

  // Behind the last pixel there are zeros.
  RF_DEVICE void turn(uint32_t (&h)[kSlices][4], int b, ptx::SharedAddress stage,
                      const Channels& /*channels*/, int32_t /*left*/) const {
    const Staged out(stage + Shape::kInputAt + b * Shape::kBoxBytes, thread_);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) out.load(h[i], i);
  }

  // dx of 64 channels: added to, rounded, masked, put into the staging, and summed as it was put.
  // Behind the last pixel all of it is zero.
  RF_DEVICE void put(float (&dx)[Shape::kPixels / 2], Grad1x1Sums<Shape>& sums, int b,
                     ptx::SharedAddress stage, ptx::SharedAddress staging, const Channels& channels,
                     int32_t /*left*/) const {
    const uint32_t box = b * Shape::kBoxBytes;
    const Staged passed(stage + Shape::kInputAt + box, thread_);
    const Staged addend(stage + Shape::kAddendAt + box, thread_);
    const Staged raw(stage + Shape::kRawAt + box, thread_);
    const Staged residual(stage + Shape::kResidualAt + box, thread_);
    const Staged to(staging + box, thread_);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      uint32_t words[4], below[4];
      if (told_.image.shared.addend != nullptr) add_slice<T>(dx, addend, i);
      passed.load(below, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        words[m] = narrow_pair<T>(dx[8 * i + 2 * m], dx[8 * i + 2 * m + 1]);
        words[m] &= passed_pair<T>(below[m]);
      }
      to.store(i, words);
      raw.load(below, i);
      sums.template add<T>(b, words, below, channels.mean);
      if (!told_.projected) continue;
      residual.load(below, i);
      sums.template add_third<T>(b, words, below, channels.residual_mean);
    }
  }

 private:
  const Grad1x1EndTmaArguments& told_;
  int32_t first_channel_;
  uint32_t thread_;
};

#endif

}  // namespace resnet_fused
