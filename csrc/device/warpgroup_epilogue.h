// The epilogue of a warpgroup's sums: scale, shift, shortcut and ReLU in fp32, one rounding, and a
// store by TMA.
//
// A warpgroup has a staging tile of its own in shared memory: boxes of a row of 128 bytes for each
// pixel, 64 channels of 16 bits, with the swizzle of 128 bytes. While its products run TMA brings
// the shortcut there; results take the place of what they were added to, and TMA stores them. The
// next tile's products may begin before the store has read the staging.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "bn_act.h"
#include "pair.h"
#include "scalar.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

// Where a warpgroup's tile begins in the output.
struct OutputPlace {
  int32_t channel;  // counted within the group
  int32_t group;
  int32_t pixel;
};

// Scale and shift of a group's channels.
struct ChannelVectors {
  const float* scale;  // [channels], of the group
  const float* shift;  // likewise
  int32_t channels;

  RF_DEVICE float scale_of(int32_t channel) const {
    return channel < channels ? ptx::load_global_read_only(scale + channel) : 0.0f;
  }
  RF_DEVICE float shift_of(int32_t channel) const {
    return channel < channels ? ptx::load_global_read_only(shift + channel) : 0.0f;
  }
};

#if defined(RF_HAS_WGMMA)

// A box of what lies as the output does, `channel` channels behind the place's first one.
RF_DEVICE void load_box(ptx::SharedAddress to, const ptx::TensorMap* from, const OutputPlace& place,
                        int32_t channel, ptx::SharedAddress barrier) {
  ptx::tma_load(to, from, {place.channel + channel, place.group, place.pixel}, barrier);
}
RF_DEVICE void store_box(const ptx::TensorMap* to, const OutputPlace& place, int32_t channel,
                         ptx::SharedAddress from) {
  ptx::tma_store(to, {place.channel + channel, place.group, place.pixel}, from);
}

// 64 rows by kColumns columns of sums as they lie in the staging, and a thread's places in it.
template <Orientation kOrientation, int kColumns>
class StagedTile {
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;

 public:
  static constexpr int kPixels = kPixelsLeft ? kWarpgroupRows : kColumns;
  static constexpr int kChannels = kPixelsLeft ? kColumns : kWarpgroupRows;
  static constexpr int kBoxChannels = kStepElements;
  static constexpr int kBoxes = kChannels / kBoxChannels;
  static constexpr int kBoxBytes = kPixels * kStepRowBytes;
  static constexpr int kBytes = kBoxes * kBoxBytes;
  static_assert(kColumns % (kPixelsLeft ? 64 : 16) == 0 && kColumns <= 256,
                "whole boxes of channels, of at most 256 pixels");

  // thread: of the warpgroup.
  RF_DEVICE StagedTile(ptx::SharedAddress start, uint32_t thread) : start_(start) {
    const uint32_t warp = thread / 32;
    const uint32_t matrix = thread % 32 / 8;
    // 16 rows by 16 columns of sums are four matrices of 8x8: rows 0-7 and 8-15 of the first eight
    // columns, then of the others. With channels on the left they lie transposed.
    const uint32_t side = matrix % 2, half = matrix / 2;
    const uint32_t pixel = (kPixelsLeft ? 16 * warp + 8 * side : 8 * half) + thread % 8;
    const uint32_t chunk = kPixelsLeft ? half : 2 * warp + side;
    place_ = start + pixel * kStepRowBytes + (chunk ^ pixel % 8) * 16;
  }

  RF_DEVICE ptx::SharedAddress box(int i) const { return start_ + i * kBoxBytes; }

  // The words of sums d[8 i] to d[8 i + 7]: columns 16 i to 16 i + 15, two neighbours a word.
  RF_DEVICE void load(uint32_t (&words)[4], int i) const {
    if constexpr (kPixelsLeft) {
      ptx::ldmatrix_x4(words, at(i));
    } else {
      ptx::ldmatrix_x4_trans(words, at(i));
    }
  }
  RF_DEVICE void store(int i, const uint32_t (&words)[4]) const {
    if constexpr (kPixelsLeft) {
      ptx::stmatrix_x4(at(i), words);
    } else {
      ptx::stmatrix_x4_trans(at(i), words);
    }
  }

 private:
  RF_DEVICE ptx::SharedAddress at(int i) const {
    // Two chunks further, in a row's eight; or 16 rows, with the same swizzle.
    if constexpr (kPixelsLeft) return (place_ ^ (i % 4 * 32)) + i / 4 * kBoxBytes;
    return place_ + i * 16 * kStepRowBytes;
  }

  ptx::SharedAddress start_;
  ptx::SharedAddress place_;
};

// Two neighbouring channels.
struct alignas(16) ChannelPair {
  float scale[2];
  float shift[2];
};

// What the epilogues of all types share. Staged: the shortcut as it lies in the staging. kColumns:
// of the warpgroup's sums.
template <class Staged, Orientation kOrientation, int kColumns>
class StagedEpilogue {
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;

 public:
  // What the warpgroup has for its own: staging, for what is stored and for the shortcut at a
  // multiple of 1024; with pixels on the left vectors, a ChannelPair for two columns; an mbarrier
  // of one arrival; the number of a named barrier.
  struct Own {
    ptx::SharedAddress staging;
    ptx::SharedAddress vectors;
    ptx::SharedAddress residual;
    int barrier;
  };

  // thread: of the warpgroup.
  RF_DEVICE StagedEpilogue(const Own& own, uint32_t thread)
      : staged_(own.staging, thread), own_(own), thread_(thread) {}

  // While the products run: fetches scale and shift, and, once the last store has read the staging,
  // asks for the shortcut; null for none. Place: an OutputPlace, or what has boxes of its own.
  template <class Place>
  RF_DEVICE void begin(const ChannelVectors& vectors, const ptx::TensorMap* residual,
                       const Place& place) {
    fetch(vectors, place.channel);
    if (thread_ == 0) {
      ptx::bulk_wait_group_read<0>();
      if (residual != nullptr) {
        ptx::mbarrier_arrive_expect_tx(own_.residual, kShortcutBytes);
        for (int i = 0; i < Staged::kBoxes; ++i) {
          load_box(staged_.box(i), residual, place, i * Staged::kBoxChannels, own_.residual);
        }
      }
    }
    ptx::sync_warp();
  }

  // Before the block ends: its shared memory has been read.
  RF_DEVICE void end() const {
    if (thread_ == 0) ptx::bulk_wait_group_read<0>();
  }

 protected:
  static constexpr int kShortcutBytes = Staged::kBytes;

  RF_DEVICE void meet() const { ptx::barrier_sync(own_.barrier, kWarpgroupThreads); }

  // The vectors are there, and the thread that waited for the last store is here.
  RF_DEVICE void wait_for_vectors() const { meet(); }
  RF_DEVICE void wait_for_residual() {
    ptx::mbarrier_wait_parity(own_.residual, parity_);
    parity_ ^= 1;
  }

  // Scale and shift of sums d[8 i + 4 half] and the next one, and of d[8 i + 4 half + 2] and the
  // next one: with pixels on the left of two neighbouring channels, `half` of 16 columns; else of
  // one channel, of the upper rows or the lower.
  RF_DEVICE ChannelPair pair_of(int i, int half) const {
    if constexpr (kPixelsLeft) {
      return ptx::load_shared<ChannelPair>(own_.vectors +
                                           (8 * i + 4 * half + thread_ % 4) * sizeof(ChannelPair));
    } else {
      return {{rows_.scale[half], rows_.scale[half]}, {rows_.shift[half], rows_.shift[half]}};
    }
  }

  // Stores the staging, as far as it lies in `out`. channels: of a group.
  template <class Stored, class Place>
  RF_DEVICE void send(const Stored& stored, const ptx::TensorMap* out, const Place& place,
                      int32_t channels) const {
    ptx::fence_proxy_async_shared();
    meet();
    if (thread_ == 0) {
      for (int i = 0; i < Stored::kBoxes; ++i) {
        const int32_t channel = i * Stored::kBoxChannels;
        if (place.channel + channel >= channels) break;
        store_box(out, place, channel, stored.box(i));
      }
      ptx::bulk_commit_group();
    }
    ptx::sync_warp();
  }

  RF_DEVICE void fetch(const ChannelVectors& vectors, int32_t channel) {
    if constexpr (kPixelsLeft) {
      // A thread needs a quarter of them all: through shared memory.
      if (thread_ < kColumns / 2) {
        const int32_t first = channel + static_cast<int32_t>(2 * thread_);
        const ChannelPair pair{{vectors.scale_of(first), vectors.scale_of(first + 1)},
                               {vectors.shift_of(first), vectors.shift_of(first + 1)}};
        ptx::store_shared(own_.vectors + thread_ * sizeof(ChannelPair), pair);
      }
    } else {
      const auto row = static_cast<int32_t>(thread_ / 32 * 16 + thread_ % 32 / 4);
#pragma unroll
      for (int side = 0; side < 2; ++side) {  // rows g and g + 8
        rows_.scale[side] = vectors.scale_of(channel + row + 8 * side);
        rows_.shift[side] = vectors.shift_of(channel + row + 8 * side);
      }
    }
  }

  Staged staged_;
  Own own_;
  uint32_t thread_;
  uint32_t parity_ = 0;
  ChannelPair rows_;  // of rows g and g + 8, with channels on the left
};

// T: BFloat16 or Float16.
template <class T, Orientation kOrientation, int kColumns>
class WarpgroupEpilogue
    : public StagedEpilogue<StagedTile<kOrientation, kColumns>, kOrientation, kColumns> {
  using Staged = StagedTile<kOrientation, kColumns>;
  using Base = StagedEpilogue<Staged, kOrientation, kColumns>;
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;

 public:
  static constexpr int kStagingBytes = Staged::kBytes;
  using Base::Base;

  // Stores act(scale d + shift [+ shortcut]) as far as it lies in `out`. d: pinned behind its wait.
  // channels: of a group.
  RF_DEVICE void finish(const float (&d)[kColumns / 2], float floor, const ptx::TensorMap* out,
                        bool residual, const OutputPlace& place, int32_t channels) {
    this->wait_for_vectors();
    if (residual) {
      this->wait_for_residual();
      put_results<true>(d, floor);
    } else {
      put_results<false>(d, floor);
    }
    this->send(this->staged_, out, place, channels);
  }

 protected:
  template <bool kResidual>
  RF_DEVICE void put_results(const float (&d)[kColumns / 2], float floor) const {
    const BnAct<float> op{floor};
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      const ChannelPair pairs[2] = {this->pair_of(i, 0), this->pair_of(i, 1)};
      uint32_t words[4];
      if constexpr (kResidual) this->staged_.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const ChannelPair& of = pairs[kPixelsLeft ? m / 2 : m % 2];
        const float a = d[8 * i + 2 * m], b = d[8 * i + 2 * m + 1];
        if constexpr (kResidual) {
          const float low = widen(T{static_cast<uint16_t>(words[m])});
          const float high = widen(T{static_cast<uint16_t>(words[m] >> 16)});
          words[m] = narrow_pair<T>(op(a, of.scale[0], of.shift[0], low),
                                    op(b, of.scale[1], of.shift[1], high));
        } else {
          words[m] =
              narrow_pair<T>(op(a, of.scale[0], of.shift[0]), op(b, of.scale[1], of.shift[1]));
        }
      }
      this->staged_.store(i, words);
    }
  }
};

#endif

}  // namespace resnet_fused
