// The epilogue of conv_bn_dgrad for sm_90a: what comes through the shortcut is added to a
// warpgroup's sums, the gradient rounded once, masked by the ReLU below, stored, and summed as it
// was stored.
//
// Shortcut and raw come by TMA into staging tiles while the products run. Results take the
// shortcut's place, from where TMA stores them; beside that they are summed (gradient_rows.h).
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "bn_dgrad_tma.h"
#include "channel_lanes.h"
#include "gathered_addend.h"
#include "gradient_mask.h"
#include "gradient_rows.h"
#include "merge_gradients.h"
#include "phase_place.h"
#include "warpgroup_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <class T, class Shape>
class BnDgradStore : public StagedEpilogue<StagedTile<Orientation::kPixelsLeft, Shape::kColumns>,
                                           Orientation::kPixelsLeft, Shape::kColumns> {
  using Staged = StagedTile<Orientation::kPixelsLeft, Shape::kColumns>;
  using Base = StagedEpilogue<Staged, Orientation::kPixelsLeft, Shape::kColumns>;
  static constexpr int kColumns = Shape::kColumns;
  using Rows = GradientRows<T, kColumns>;

 public:
  // shared: of the block; consumer: which of its warpgroups.
  RF_DEVICE BnDgradStore(const ConvBnDgradTmaArguments& arguments, ptx::SharedAddress shared,
                         uint32_t consumer, uint32_t thread)
      : Base({shared + Shape::kStagingAt + consumer * Shape::kStagingBytes,
              shared + Shape::kVectorsAt + consumer * Shape::kVectorsBytes,
              shared + Shape::kOwnAt + consumer * Shape::kOwnBytes, static_cast<int>(1 + consumer)},
             thread),
        arguments_(arguments),
        raw_(shared + Shape::kRawAt + consumer * Shape::kStagingBytes, thread),
        thread_sums_(shared + Shape::kThreadSumsAt + consumer * Shape::kThreadSumsBytes),
        rows_(thread_sums_, thread),
        consumer_(static_cast<int32_t>(consumer)) {}

  // While the products run: fetches scale and shift, asks for the shortcut and for raw.
  RF_DEVICE void begin(int32_t phase, const PhasePlace& place) {
    const ConvTmaArguments& conv = of(phase);
    const float* const norm = arguments_.norm + place.group * conv.channels;
    Base::begin(
        {norm, norm + arguments_.reduction.channels, arguments_.reduced ? conv.channels : 0},
        conv.has_residual && !gathers() ? &conv.residual : nullptr, place);
    if (arguments_.reduced && this->thread_ == 0) {
      ptx::mbarrier_arrive_expect_tx(raw_barrier(), Staged::kBytes);
      for (int i = 0; i < Staged::kBoxes; ++i) {
        load_box(raw_.box(i), &arguments_.raw[phase], place, i * Staged::kBoxChannels,
                 raw_barrier());
      }
    }
    ptx::sync_warp();
    if (gathers()) {
      this->meet();  // the last store has read the staging
      gather_addend<T, kColumns>(arguments_.gathered, conv, place, this->staged_, this->thread_);
    }
  }

  RF_DEVICE void finish(const float (&d)[kColumns / 2], int32_t phase, const TmaTile& tile,
                        const PhasePlace& place) {
    const ConvTmaArguments& conv = of(phase);
    if (gathers()) ptx::cp_async_wait_group<0>();
    this->wait_for_vectors();  // and for what the others have gathered
    if (conv.has_residual && !gathers()) this->wait_for_residual();
    if (arguments_.reduced) {
      ptx::mbarrier_wait_parity(raw_barrier(), raw_parity_);
      raw_parity_ ^= 1;
      conv.has_residual ? put<true, true>(d) : put<false, true>(d);
    } else {
      conv.has_residual ? put<true, false>(d) : put<false, false>(d);
    }
    this->send(this->staged_, &conv.out, place, conv.channels);
    if (!arguments_.reduced) return;
    // Of a cluster's tiles the last ones may begin behind the last pixel or channel: nobody counts
    // them among those that meet.
    if constexpr (Shape::kSharing > 1) {
      if (tile.pixels >= arguments_.tiles_that_meet || place.channel >= conv.channels) return;
    }
    measure(phase, tile, place);
  }

 private:
  RF_DEVICE const ConvTmaArguments& of(int32_t phase) const {
    return arguments_.dgrad.phases[phase].conv;
  }
  RF_DEVICE bool gathers() const { return arguments_.gathered.first != nullptr; }
  RF_DEVICE ptx::SharedAddress raw_barrier() const { return this->own_.residual + kBarrierBytes; }

  static RF_DEVICE float half_of(uint32_t word, int half) {
    return widen(T{static_cast<uint16_t>(word >> (16 * half))});
  }

  template <bool kAdded, bool kReduced>
  RF_DEVICE void put(const float (&d)[kColumns / 2]) const {
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      const ChannelPair pairs[2] = {this->pair_of(i, 0), this->pair_of(i, 1)};
      uint32_t words[4], raw[4];
      if constexpr (kAdded) this->staged_.load(words, i);
      if constexpr (kReduced) raw_.load(raw, i);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const ChannelPair& of = pairs[m / 2];
        float dx[2] = {d[8 * i + 2 * m], d[8 * i + 2 * m + 1]};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (kAdded) dx[e] += half_of(words[m], e);
          if constexpr (kReduced) {
            // As forward made it. Not (h > 0): where it is NaN, the gradient passes.
            const float h =
                widen(narrow<T>(__builtin_fmaf(of.scale[e], half_of(raw[m], e), of.shift[e])));
            if (h <= 0.0f) dx[e] = 0.0f;
          }
        }
        words[m] = narrow_pair<T>(dx[0], dx[1]);
      }
      this->staged_.store(i, words);
    }
  }

  // The sums of this tile's channels, of what has been stored of them, and the meeting with other
  // tiles'.
  RF_DEVICE void measure(int32_t phase, const TmaTile& tile, const PhasePlace& place) {
    const ConvTmaArguments& conv = of(phase);
    const GradientReduction& reduction = arguments_.reduction;
    const int32_t first = place.in_all, columns = conv.channels - place.channel;
    const float* const mean = arguments_.norm + 2 * reduction.channels + first;
    float sums[2][Rows::kUnit];
    rows_.take(sums, this->staged_, raw_, {mean, columns, conv.grid.pixels - place.pixel});
    rows_.leave(sums);
    this->meet();  // and both tiles have been read
    const int32_t row = reduction.first_row +
                        (tile.pixels * arguments_.dgrad.count + phase) * kConsumers + consumer_;
    if (this->thread_ < kColumns && rows_.column() < columns) {
      ptx::store_global(reduction.partial + row * reduction.channels + first + rows_.column(),
                        GradientSums{rows_.total(0), rows_.total(1)});
    }
    const int32_t of_group = (conv.channels + Shape::kChannels - 1) / Shape::kChannels;
    merge_gradient_sums<MergingWarpgroup<kColumns>>(
        reduction, {static_cast<uint32_t>(tile.group * of_group + tile.channels), first, columns},
        row, thread_sums_, this->own_.residual + 2 * kBarrierBytes, this->thread_);
  }

  const ConvBnDgradTmaArguments& arguments_;
  Staged raw_;
  ptx::SharedAddress thread_sums_;
  Rows rows_;
  int32_t consumer_;
  uint32_t raw_parity_ = 0;
};

#endif

}  // namespace resnet_fused
