// The steps of bn_add_act_conv_stats for sm_90a: what TMA brings of them, what is made of it where
// it lies, and how that is stored for others.
#pragma once

#include <cstdint>

#include "../ptx/tma.h"
#include "block_end_tma.h"
#include "normed_rows.h"
#include "tap_steps.h"
#include "transform_ring.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// A transforming thread's way: it puts rnd(relu(scale * y + shift + r)) where y's pixels lie.
// Channels behind the last one become zeros; of pixels behind the last one something is made that
// nobody stores or measures. kProjected: r is the shortcut behind a BatchNorm of its own.
template <class T, class Shape, bool kProjected>
class BlockEndRows : public TapSteps<T, Shape> {
  struct Units {
    RowUnit raw;
    RowUnit shortcut;
  };

 public:
  // thread: of those who transform.
  RF_DEVICE BlockEndRows(const BlockEndTmaArguments& arguments, const TileWalk& walk,
                         uint32_t thread)
      : TapSteps<T, Shape>(arguments.stats.conv, walk), arguments_(arguments), rows_(thread) {}

  // Fetches the step's scales and shifts, while it may still be on its way.
  RF_DEVICE void prepare() {
    const ConvStatsTmaArguments& stats = arguments_.stats;
    const int32_t channel = this->column_.c + rows_.channel();
    const bool known = channel < stats.conv.reduction.channels;
    load_known(scale_, stats.norm.scale + channel, known);
    load_known(shift_, stats.norm.shift + channel, known);
    if constexpr (kProjected) {
      load_known(shortcut_scale_, arguments_.shortcut_scale + channel, known);
      load_known(shortcut_shift_, arguments_.shortcut_shift + channel, known);
    }
  }

  // A step that has come.
  RF_DEVICE void transform(ptx::SharedAddress stage) const {
    constexpr uint32_t kBeside = Shape::kShortcutAt - Shape::kPixelsAt;
    rows_.replace(
        stage + Shape::kPixelsAt, Shape::kPixels,
        [](ptx::SharedAddress at) {
          return Units{ptx::load_shared<RowUnit>(at), ptx::load_shared<RowUnit>(at + kBeside)};
        },
        [&](const Units& units, ptx::SharedAddress) {
          RowUnit made;
#pragma unroll
          for (int i = 0; i < kUnitChannels / 2; ++i) {
            // Rounding keeps the sign, so that the ReLU may follow it.
            made.value[i] =
                larger_pair<T>(narrow_pair<T>(ended(units, i, 0), ended(units, i, 1)), 0);
          }
          return made;
        });
  }

 private:
  static RF_DEVICE float half_of_pair(uint32_t pair, int half) {
    return widen(T{static_cast<uint16_t>(pair >> (16 * half))});
  }
  // Before the ReLU, of one channel of a pair.
  RF_DEVICE float ended(const Units& units, int pair, int half) const {
    const int channel = 2 * pair + half;
    float r = half_of_pair(units.shortcut.value[pair], half);
    if constexpr (kProjected) {
      r = __builtin_fmaf(shortcut_scale_[channel], r, shortcut_shift_[channel]);
    }
    return __builtin_fmaf(scale_[channel], half_of_pair(units.raw.value[pair], half),
                          shift_[channel]) +
           r;
  }

  const BlockEndTmaArguments& arguments_;
  TransformUnits rows_;
  float scale_[kUnitChannels];
  float shift_[kUnitChannels];
  float shortcut_scale_[kProjected ? kUnitChannels : 1];
  float shortcut_shift_[kProjected ? kUnitChannels : 1];
};

// What of the steps' pixels this block stores: every columns-th step of a tile, so that no column
// of tiles stores more than its share, and each element is stored once. By one thread, whose copies
// no other ones stand among.
template <class Shape>
class BlockEndStore {
 public:
  // consumer, thread: a warpgroup, and the thread in it.
  RF_DEVICE BlockEndStore(const BlockEndTmaArguments& arguments, uint32_t consumer, uint32_t thread)
      : arguments_(arguments), mine_(consumer == 0 && thread == kThread) {}

  // To a tile: its pixels, and its column's share of the steps.
  RF_DEVICE void enter(const TmaTile& tile) {
    pixel_ = tile.pixels * Shape::kPixels;
    column_ = tile.channels;
  }

  // A step that is ready, of which the pixels lie at `from`. Steps of others are empty groups.
  RF_DEVICE void send(int32_t step, ptx::SharedAddress from) const {
    if (!mine_) return;
    const Divisor& columns = arguments_.stats.conv.tiles.of_group;
    const auto round = static_cast<int32_t>(quotient(static_cast<uint32_t>(step), columns));
    if (step - round * static_cast<int32_t>(columns.value) == column_) {
      ptx::tma_store(&arguments_.made, {step * kStepElements, pixel_}, from);
    }
    ptx::bulk_commit_group();
  }
  // Before a step is let go: its pixels have been read. last: none has been sent behind it.
  RF_DEVICE void wait(bool last) const {
    if (!mine_) return;
    if (last) {
      ptx::bulk_wait_group_read<0>();
    } else {
      ptx::bulk_wait_group_read<1>();
    }
  }

 private:
  // Of the second warp: the first one's sends the results, and waits for those.
  static constexpr uint32_t kThread = 32;

  const BlockEndTmaArguments& arguments_;
  bool mine_;
  int32_t pixel_ = 0;
  int32_t column_ = 0;
};

#endif

}  // namespace resnet_fused
