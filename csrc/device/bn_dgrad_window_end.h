// The end of a tile of conv_bn_dgrad's window kernel: what comes through the shortcut is added to a
// warpgroup's sums, the gradient rounded once, masked by the ReLU below, stored and summed.
//
// Channels are the products' left side: a thread has two of them and a quarter of the positions, so
// that scale, shift and mean stay in its registers, and a channel's sums take two shuffles a tile.
// Shortcut and raw come by the output's walk while the products run; results take the place of the
// first of them. Which positions are pixels is a bit each.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "bn_dgrad_window.h"
#include "channel_lanes.h"
#include "merge_gradients.h"
#include "pair.h"
#include "scalar.h"
#include "warpgroup_epilogue.h"
#include "window_epilogue.h"
#include "window_load.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
class BnDgradWindowEnd {
  static constexpr int kPixels = Shape::kPixels;
  static constexpr int kWords = kPixels / 32;
  using Staged = StagedTile<Orientation::kChannelsLeft, kPixels>;
  static_assert(Staged::kBytes == Shape::kStagingBytes);

 public:
  // channel: the block's first one; thread: of the warpgroup.
  RF_DEVICE BnDgradWindowEnd(const BnDgradWindowArguments& arguments, ptx::SharedAddress shared,
                             int32_t channel, uint32_t consumer, uint32_t thread)
      : arguments_(arguments),
        first_(shared + Shape::kStagingAt + consumer * arguments.ends * Shape::kStagingBytes),
        raw_at_(first_ + (arguments.ends - 1) * Shape::kStagingBytes),
        staged_(first_, thread),
        raw_(raw_at_, thread),
        barrier_(shared + Shape::kOwnAt + consumer * kBarrierBytes),
        scratch_(shared + Shape::kScratchAt + consumer * Shape::kScratchBytes),
        channel_(channel),
        name_(static_cast<int>(1 + consumer)),
        thread_(thread) {
    if (!arguments.reduced) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t of = channel + row_of(side);
      scale_[side] = ptx::load_global_read_only(arguments.window.scale + of);
      shift_[side] = ptx::load_global_read_only(arguments.window.shift + of);
      mean_[side] = ptx::load_global_read_only(arguments.mean + of);
    }
  }

  // While the products run: once all threads have read what they stored last, asks for what the end
  // reads, of the tile from `position` on.
  RF_DEVICE void begin(int32_t position) {
    meet();
    if (thread_ == 0 && (arguments_.reduced || added())) {
      const Pixel first = pixel_of(position, arguments_.window.walk);
      ptx::mbarrier_arrive_expect_tx(barrier_,
                                     static_cast<uint32_t>(arguments_.ends * Staged::kBytes));
      if (added()) load_walk(first_, &arguments_.window.residual, channel_, first, barrier_);
      if (arguments_.reduced) load_walk(raw_at_, &arguments_.raw, channel_, first, barrier_);
    }
    ptx::sync_warp();
  }

  // d: pinned behind its wait.
  RF_DEVICE void finish(const float (&d)[kPixels / 2], int32_t tile) {
    const int32_t position = tile * kPixels;
    if (arguments_.reduced || added()) {
      ptx::mbarrier_wait_parity(barrier_, parity_);
      parity_ ^= 1;
    }
    if (arguments_.reduced) {
      find_pixels(position);
      added() ? put<true, true>(d) : put<false, true>(d);
    } else {
      added() ? put<true, false>(d) : put<false, false>(d);
    }
    ptx::fence_proxy_async_shared();  // TMA writes here again, behind the next `begin`
    meet();
    store_window<T, kPixels>(arguments_.window, first_, position, channel_, thread_);
    if (arguments_.reduced) leave(tile);
  }

 private:
  RF_DEVICE void meet() const { ptx::barrier_sync(name_, kWarpgroupThreads); }
  RF_DEVICE bool added() const { return arguments_.window.has_residual; }
  // A thread's channel of the block's.
  RF_DEVICE int32_t row_of(int side) const {
    return static_cast<int32_t>(thread_ / 32 * 16 + thread_ % 32 / 4) + 8 * side;
  }
  static RF_DEVICE float half_of(uint32_t word, int half) {
    return widen(T{static_cast<uint16_t>(word >> (16 * half))});
  }

  // A bit for each position of the tile, from the thread's first one on.
  RF_DEVICE void find_pixels(int32_t position) {
    const PixelGrid& walk = arguments_.window.walk;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int32_t m = position + 32 * i + static_cast<int32_t>(thread_ % 32);
      const bool there = is_pixel(pixel_of(m, walk), m, walk);
      pixels_[i] = ptx::ballot(ptx::kWholeWarp, there) >> (thread_ % 4 * 2);
    }
  }

  template <bool kAdded, bool kReduced>
  RF_DEVICE void put(const float (&d)[kPixels / 2]) {
    if constexpr (kReduced) clear(sums_);
#pragma unroll
    for (int i = 0; i < kPixels / 16; ++i) {
      uint32_t words[4], raw[4];
      if constexpr (kAdded) staged_.load(words, i);
      if constexpr (kReduced) raw_.load(raw, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int side = m % 2;
        float dx[2] = {d[8 * i + 2 * m], d[8 * i + 2 * m + 1]};
        if constexpr (kAdded) {
#pragma unroll
          for (int e = 0; e < 2; ++e) dx[e] += half_of(words[m], e);
        }
        if constexpr (kReduced) {
          // As forward made it. Not (h > 0): where it is NaN, the gradient passes.
          const auto h = [&](int e) {
            return __builtin_fmaf(scale_[side], half_of(raw[m], e), shift_[side]);
          };
          const uint32_t rounded = narrow_pair<T>(h(0), h(1));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (half_of(rounded, e) <= 0.0f) dx[e] = 0.0f;
          }
        }
        words[m] = narrow_pair<T>(dx[0], dx[1]);
        if constexpr (kReduced) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((pixels_[i / 2] >> (i % 2 * 16 + m / 2 * 8 + e) & 1) == 0) continue;
            const float passed = half_of(words[m], e);
            sums_[2 * side] += passed;
            sums_[2 * side + 1] =
                __builtin_fmaf(passed, half_of(raw[m], e) - mean_[side], sums_[2 * side + 1]);
          }
        }
      }
      staged_.store(i, words);
    }
  }

  // The sums of the tile's channels, and the meeting with other tiles'.
  RF_DEVICE void leave(int32_t tile) {
    const GradientReduction& reduction = arguments_.reduction;
    const int32_t row = reduction.first_row + tile;
#pragma unroll
    for (float& sum : sums_) sum = sum_of_channel(sum);
    if (thread_ % 4 == 0) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        ptx::store_global(reduction.partial + row * reduction.channels + channel_ + row_of(side),
                          GradientSums{sums_[2 * side], sums_[2 * side + 1]});
      }
    }
    merge_gradient_sums<MergingWarpgroup<>>(
        reduction, {static_cast<uint32_t>(channel_ / kWarpgroupRows), channel_, kWarpgroupRows},
        row, scratch_, scratch_ + Shape::kMergedBytes, thread_);
  }

  const BnDgradWindowArguments& arguments_;
  ptx::SharedAddress first_;   // what is added, and the result
  ptx::SharedAddress raw_at_;  // raw: there, too, where nothing is added
  Staged staged_;
  Staged raw_;
  ptx::SharedAddress barrier_;
  ptx::SharedAddress scratch_;
  int32_t channel_;
  int name_;  // of the warpgroup's barrier
  uint32_t thread_;
  uint32_t parity_ = 0;
  uint32_t pixels_[kWords] = {};
  // Of the channels of rows g and g + 8; of each its two sums.
  float scale_[2] = {};
  float shift_[2] = {};
  float mean_[2] = {};
  float sums_[4] = {};
};

#endif

}  // namespace resnet_fused
