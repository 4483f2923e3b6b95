// The epilogue of conv_bn_stats for sm_90a: sums are rounded, stored by TMA, and measured as they
// were rounded.
//
// Channels are the products' left side, so that four lanes hold all of a tile's pixels of a
// channel: two shuffles a sum, and no other warp takes part. A tile's mean and the squares around
// it come in two passes over registers; tiles are added up in float64 around the first one's mean,
// so that a block leaves two numbers a channel however many tiles it has had.
#pragma once

#include <cstdint>

#include "../ptx/keep.h"
#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "channel_lanes.h"
#include "merge_moments.h"
#include "pair.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The columns of a tile that are measured, as a thread asks for them: what a filter with a NaN has
// made of the others is not 0. `column`: counted from the thread's first one on.
class FirstColumns {
 public:
  // The first `count` ones.
  RF_DEVICE FirstColumns(int32_t count, uint32_t thread)
      : left_(count - static_cast<int32_t>(2 * (thread % 4))) {}

  RF_DEVICE bool has(int column) const { return column < left_; }
  // From here on a question is asked again: the answers would take registers.
  RF_DEVICE void keep() { ptx::keep(left_); }

 private:
  int32_t left_;
};

// T: BFloat16 or Float16. kColumns: pixels of a tile.
template <class T, int kColumns>
class WalkMoments : public StagedEpilogue<StagedTile<Orientation::kChannelsLeft, kColumns>,
                                          Orientation::kChannelsLeft, kColumns> {
  using Staged = StagedTile<Orientation::kChannelsLeft, kColumns>;
  using Base = StagedEpilogue<Staged, Orientation::kChannelsLeft, kColumns>;

 public:
  static constexpr int kStagingBytes = Staged::kBytes;
  using Base::Base;

  // While the products run: waits until the last store has read the staging.
  RF_DEVICE void begin() const {
    if (this->thread_ == 0) ptx::bulk_wait_group_read<0>();
    ptx::sync_warp();
  }

  // Stores d, rounded, as far as it lies in `out`, and measures its first `pixels` columns. d:
  // pinned behind its wait; afterwards it is rounded. Place: an OutputPlace, or what has boxes of
  // its own. channels: of a group.
  template <class Place>
  RF_DEVICE void finish(float (&d)[kColumns / 2], const ptx::TensorMap* out, const Place& place,
                        int32_t channels, int32_t pixels) {
    measure(d, FirstColumns(pixels, this->thread_), pixels,
            [&] { this->send(this->staged_, out, place, channels); });
  }

  // Behind the last tile of a walk that has had one: stores the part's moments, and merges those of
  // all parts where they are the last ones. Arguments: as of merge_moments.
  template <class Arguments>
  RF_DEVICE void leave(const Arguments& arguments, const MeasuredColumn& where,
                       int32_t part) const {
    const auto row = static_cast<int32_t>(this->thread_ / 32 * 16 + this->thread_ % 32 / 4);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int32_t channel = row + 8 * side;
      if (this->thread_ % 4 != 0 || channel >= where.columns) continue;
      const WideMoments all = moments_around(pivot_[side], pixels_, sums_[side]);
      ptx::store_global(
          arguments.moments + int64_t{part} * arguments.filters() + where.channel + channel,
          Moments{static_cast<float>(all.mean), static_cast<float>(all.m2)});
    }
    // The staging is no store's any more.
    this->end();
    const ptx::SharedAddress scratch =
        this->own_.staging + kWarpgroupThreads * static_cast<int>(sizeof(ColumnSums));
    merge_moments<MergingWarpgroup<>>(arguments, where, part, this->own_.staging, scratch,
                                      this->thread_);
  }

 protected:
  // Puts d, rounded, into the staging, calls `send`, and measures those of its columns that are
  // `pixels`, so many, at least one.
  template <class Columns, class Send>
  RF_DEVICE void measure(float (&d)[kColumns / 2], Columns columns, int32_t pixels,
                         const Send& send) {
    this->meet();
    float total[2][2] = {};  // of rows g and g + 8, each of even pixels and of odd ones
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int at = 8 * i + 2 * m;
        words[m] = narrow_pair<T>(d[at], d[at + 1]);
        d[at] = widen(T{static_cast<uint16_t>(words[m])});
        d[at + 1] = widen(T{static_cast<uint16_t>(words[m] >> 16)});
        if (columns.has(pixel_of_sum(at))) total[m % 2][0] += d[at];
        if (columns.has(pixel_of_sum(at + 1))) total[m % 2][1] += d[at + 1];
      }
      this->staged_.store(i, words);
    }
    send();
    const float share = 1.0f / static_cast<float>(pixels);
    float mean[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      mean[side] = sum_of_channel(total[side][0] + total[side][1]) * share;
    }
    columns.keep();
    float squares[2][2] = {};
#pragma unroll
    for (int at = 0; at < kColumns / 2; ++at) {
      const int side = at / 2 % 2;
      const float off = d[at] - mean[side];
      if (columns.has(pixel_of_sum(at))) {
        squares[side][at % 2] = __builtin_fmaf(off, off, squares[side][at % 2]);
      }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float m2 = sum_of_channel(squares[side][0] + squares[side][1]);
      if (pixels_ == 0) pivot_[side] = mean[side];
      add_around(pivot_[side], pixels, mean[side], m2, sums_[side]);
    }
    pixels_ += pixels;
  }

 private:
  // The pixel of a sum, counted from the lane's first one on.
  static RF_HOST_DEVICE constexpr int pixel_of_sum(int at) {
    return at / 8 * 16 + at % 8 / 4 * 8 + at % 2;
  }

  float pivot_[2];  // of rows g and g + 8; so below
  ColumnSums sums_[2] = {};
  int32_t pixels_ = 0;
};

#endif

}  // namespace resnet_fused
