// The epilogue of conv_bn_dgrad_end for sm_90a: what comes through the shortcut is added to a
// warpgroup's sums, the gradient rounded once, masked by the sign of `out`, stored, and summed as
// it was stored.
//
// Shortcut and `out` come by TMA into staging tiles, asked for as soon as the last tile's have been
// read. Of `out` a bit an element is needed: each thread keeps those of its own sums while the
// products run, and raw takes `out`'s place, as behind a projection its raw output takes raw's.
// Results take the shortcut's place, from where TMA stores them, and from where they are summed.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "bn_dgrad_end_tma.h"
#include "channel_lanes.h"
#include "gathered_addend.h"
#include "gradient_rows.h"
#include "merge_gradients.h"
#include "pair.h"
#include "passed_pair.h"
#include "phase_place.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
class BnDgradEndStore : public StagedEpilogue<StagedTile<Orientation::kPixelsLeft, Shape::kColumns>,
                                              Orientation::kPixelsLeft, Shape::kColumns> {
  static constexpr int kColumns = Shape::kColumns;
  using Staged = StagedTile<Orientation::kPixelsLeft, kColumns>;
  using Base = StagedEpilogue<Staged, Orientation::kPixelsLeft, kColumns>;
  using Rows = GradientRows<T, kColumns>;
  // Of a thread's words of two sums, whose bits lie in one register, a bit in each half.
  static constexpr int kKept = 16;
  static constexpr uint32_t kBothHalves = 0x00010001u;

 public:
  // shared: of the block; consumer: which of its warpgroups.
  RF_DEVICE BnDgradEndStore(const ConvBnDgradEndTmaArguments& arguments, ptx::SharedAddress shared,
                            uint32_t consumer, uint32_t thread)
      : Base({shared + Shape::kStagingAt + consumer * Shape::kStagingBytes,
              shared + Shape::kVectorsAt + consumer * Shape::kVectorsBytes,
              shared + Shape::kOwnAt + consumer * Shape::kOwnBytes, static_cast<int>(1 + consumer)},
             thread),
        arguments_(arguments),
        other_(shared + Shape::kRawAt + consumer * Shape::kStagingBytes, thread),
        meeting_(shared + Shape::kThreadSumsAt + consumer * Shape::kThreadSumsBytes),
        rows_(meeting_, thread),
        consumer_(static_cast<int32_t>(consumer)) {}

  // Once all threads have read both tiles: asks for a tile's shortcut, when the last store has read
  // its place, and for `out`.
  RF_DEVICE void ask(int32_t phase, const PhasePlace& place) const {
    const ConvTmaArguments& conv = of(phase);
    if (this->thread_ == 0) {
      ptx::bulk_wait_group_read<0>();
      if (conv.has_residual && !gathers()) {
        load_tile(this->staged_, &conv.residual, place, this->own_.residual);
      }
      load_tile(other_, &arguments_.out[phase], place, other_barrier());
    }
    ptx::sync_warp();
    if (gathers()) {
      this->meet();  // the last store has read the staging
      gather_addend<T, kColumns>(arguments_.image.gathered, conv, place, this->staged_,
                                 this->thread_);
    }
  }

  // While the products run: keeps what `out` says, and asks for raw.
  RF_DEVICE void begin(int32_t phase, const PhasePlace& place) {
    wait_for_other();
#pragma unroll
    for (int k = 0; k < kColumns / (4 * kKept); ++k) {
      passed_[k] = 0;
#pragma unroll
      for (int i = 0; i < kKept / 4; ++i) {
        uint32_t words[4];
        other_.load(words, kKept / 4 * k + i);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          passed_[k] |= passed_pair<T>(words[m]) & kBothHalves << (4 * i + m);
        }
      }
    }
    if (gathers()) ptx::cp_async_wait_group<0>();
    this->meet();  // all have read, and what they gather is there
    if (this->thread_ == 0) {
      load_tile(other_, &arguments_.image.raw[phase], place, other_barrier());
    }
    ptx::sync_warp();
  }

  // ask_next: for the next tile, if there is one.
  template <class AskNext>
  RF_DEVICE void finish(const float (&d)[kColumns / 2], int32_t phase, const TmaTile& tile,
                        const PhasePlace& place, const AskNext& ask_next) {
    const ConvTmaArguments& conv = of(phase);
    if (conv.has_residual) {
      if (!gathers()) this->wait_for_residual();
      put<true>(d);
    } else {
      put<false>(d);
    }
    this->send(this->staged_, &conv.out, place, conv.channels);
    wait_for_other();
    // Of a cluster's tiles the last ones may begin behind the last pixel or channel: nobody counts
    // them among those that meet.
    if constexpr (Shape::kSharing > 1) {
      if (tile.pixels >= arguments_.image.tiles_that_meet || place.channel >= conv.channels) {
        this->meet();  // all have seen raw come, or the barrier would be two phases further
        ask_next();
        return;
      }
    }
    measure(phase, tile, place, ask_next);
  }

 private:
  RF_DEVICE const ConvTmaArguments& of(int32_t phase) const {
    return arguments_.image.dgrad.phases[phase].conv;
  }
  RF_DEVICE bool gathers() const { return arguments_.image.gathered.first != nullptr; }
  RF_DEVICE ptx::SharedAddress other_barrier() const { return this->own_.residual + kBarrierBytes; }
  RF_DEVICE void wait_for_other() {
    ptx::mbarrier_wait_parity(other_barrier(), other_parity_);
    other_parity_ ^= 1;
  }

  static RF_DEVICE void load_tile(const Staged& to, const ptx::TensorMap* from,
                                  const PhasePlace& place, ptx::SharedAddress barrier) {
    ptx::mbarrier_arrive_expect_tx(barrier, Staged::kBytes);
    for (int i = 0; i < Staged::kBoxes; ++i) {
      load_box(to.box(i), from, place, i * Staged::kBoxChannels, barrier);
    }
  }

  template <bool kAdded>
  RF_DEVICE void put(const float (&d)[kColumns / 2]) const {
    const auto half_of = [](uint32_t word, int half) {
      return widen(T{static_cast<uint16_t>(word >> (16 * half))});
    };
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t words[4];
      if constexpr (kAdded) this->staged_.load(words, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        float dx[2] = {d[8 * i + 2 * m], d[8 * i + 2 * m + 1]};
        if constexpr (kAdded) {
          dx[0] += half_of(words[m], 0);
          dx[1] += half_of(words[m], 1);
        }
        const int word = 4 * i + m;
        const uint32_t bits = passed_[word / kKept] >> (word % kKept) & kBothHalves;
        words[m] = narrow_pair<T>(dx[0], dx[1]) & bits * 0xFFFFu;
      }
      this->staged_.store(i, words);
    }
  }

  // The sums of this tile's channels, of what has been stored of them, and the meeting with other
  // tiles'.
  template <class AskNext>
  RF_DEVICE void measure(int32_t phase, const TmaTile& tile, const PhasePlace& place,
                         const AskNext& ask_next) {
    const ConvBnDgradTmaArguments& image = arguments_.image;
    const ConvTmaArguments& conv = of(phase);
    const GradientReduction& reduction = image.reduction;
    const int32_t first = place.in_all, columns = conv.channels - place.channel;
    const int32_t rows = conv.grid.pixels - place.pixel;
    const float* const mean = image.norm + 2 * reduction.channels + first;
    float sums[2][Rows::kUnit];
    rows_.take(sums, this->staged_, other_, {mean, columns, rows});
    rows_.leave(sums);
    this->meet();  // and both tiles have been read
    if (!arguments_.projected) {
      ask_next();
    } else if (this->thread_ == 0) {
      load_tile(other_, &arguments_.residual[phase], place, other_barrier());
    }
    ptx::sync_warp();
    const int32_t row =
        reduction.first_row + (tile.pixels * image.dgrad.count + phase) * kConsumers + consumer_;
    const int64_t at = row * reduction.channels + first + rows_.column();
    const bool adds = this->thread_ < kColumns && rows_.column() < columns;
    if (adds) {
      ptx::store_global(reduction.partial + at, GradientSums{rows_.total(0), rows_.total(1)});
    }
    if (arguments_.projected) {
      float more[1][Rows::kUnit];
      wait_for_other();
      rows_.take(more, this->staged_, other_, {arguments_.residual_mean + first, columns, rows});
      this->meet();  // the sums have been read, and both tiles
      ask_next();
      rows_.leave(more);
      this->meet();
      if (adds) ptx::store_global(arguments_.third.partial + at, rows_.total(0));
    }
    const int32_t of_group = (conv.channels + Shape::kChannels - 1) / Shape::kChannels;
    merge_gradient_sums<MergingWarpgroup<kColumns>>(
        reduction, {static_cast<uint32_t>(tile.group * of_group + tile.channels), first, columns},
        row, meeting_, this->own_.residual + 2 * kBarrierBytes, this->thread_, arguments_.third);
  }

  const ConvBnDgradEndTmaArguments& arguments_;
  Staged other_;  // `out`, raw, and the projection's, one after the other
  ptx::SharedAddress meeting_;
  Rows rows_;
  int32_t consumer_;
  uint32_t other_parity_ = 0;
  uint32_t passed_[kColumns / (4 * kKept)];
};

#endif

}  // namespace resnet_fused
