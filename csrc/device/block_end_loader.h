// The operands of a 1x1 convolution whose pixels are the end of a residual block: made of the last
// raw output and the shortcut, rnd(relu(scale * y + shift + r)), and stored for others besides.
//
// Both lie in a step as they are. A thread makes what it has copied itself, where y lay, before
// others read: no barrier is added. Every column of tiles makes all of its pixels' channels, and
// stores those of every columns-th step: none waits for another, none stores more than its share.
#pragma once

#include <cstdint>

#include "block_end_geometry.h"
#include "conv_loader.h"
#include "normed_operand.h"
#include "vector.h"

namespace resnet_fused {

// kProjected: the shortcut is read through a BatchNorm of its own.
template <class T, class Shape, bool kProjected>
class BlockEndLoader {
  using Pattern = LoadPattern<T, Shape, LoadWidth::kWide>;
  using Left = RowLoader<T, Shape, LoadWidth::kWide, Shape::kM>;
  using Right = RowLoader<T, Shape, LoadWidth::kWide, Shape::kN>;
  static constexpr int kUnit = Pattern::kUnit;
  using PixelUnit = Unit<T, kUnit>;
  static_assert(Pattern::kPasses == 1);

 public:
  // The first step is step `first` of the reduction.
  RF_DEVICE BlockEndLoader(const BlockEndArguments& arguments, const Tile& tile, int32_t first,
                           uint32_t thread)
      : arguments_(arguments), left_(thread), right_(thread) {
    const auto row = static_cast<int32_t>(thread / Pattern::kLanes);
    pixel_ = tile.m * Shape::kM + row;
    filter_ = tile.n * Shape::kN + row;
    wanted_ = first * Pattern::kStep + static_cast<int32_t>(thread % Pattern::kLanes) * kUnit;
    landed_ = wanted_;
    const int32_t columns = arguments.stats.tiles.tiles_n;
    ahead_ = (tile.n - first % columns + columns) % columns;
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
    const ConvOperands& operands = arguments_.stats.operands;
    const bool known = wanted_ < operands.reduction.channels;
    const auto pixels = [&](const void* from, int64_t step) {
      return [this, from, step, known](int i, int) {
        const int32_t m = pixel_ + i * Pattern::kRowStep;
        return Source<T>{static_cast<const T*>(from) + m * step + wanted_, known && exists(m)};
      };
    };
    left_.template issue<false>(stage, 0, pixels(operands.x, arguments_.raw_pixel));
    left_.template issue<false>(stage + Shape::kMaskOffset, 0,
                                pixels(arguments_.shortcut, arguments_.shortcut_pixel));
    right_.issue(stage + Shape::kRightAt, 0, [&](int i, int) {
      const int32_t k = filter_ + i * Pattern::kRowStep;
      const auto* row = static_cast<const T*>(operands.weight) + k * operands.filter_stride * kUnit;
      return Source<T>{row + wanted_, known && k < operands.filters};
    });
    wanted_ += Pattern::kStep;
  }
  RF_DEVICE void land(ptx::SharedAddress) const {}

  // Channels behind the last one stay the zeros that they arrived as. Of pixels behind the last one
  // something is made that nobody stores or measures.
  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    const bool mine = ahead_ == 0;
    ahead_ = mine ? arguments_.stats.tiles.tiles_n - 1 : ahead_ - 1;
    int32_t channel = landed_;
    landed_ += Pattern::kStep;
    if (channel >= arguments_.stats.operands.reduction.channels) return;
    [[maybe_unused]] constexpr int kAtOnce = kProjected ? 2 : Left::kRows;  // by the pragma
#pragma unroll kAtOnce
    for (int i = 0; i < Left::kRows; ++i) {
      // There are no registers for the values of two BatchNorms: they come anew for each row.
      if constexpr (kProjected) ptx::keep(channel);
      const ptx::SharedAddress at = left_.address(stage, 0, i);
      const auto shortcut = ptx::load_shared<PixelUnit>(at + Shape::kMaskOffset);
      float r[kUnit], scale[kUnit], shift[kUnit];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) r[e] = widen(shortcut.value[e]);
      if constexpr (kProjected) {
        load_channels(scale, arguments_.shortcut_scale + channel);
        load_channels(shift, arguments_.shortcut_shift + channel);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) r[e] = __builtin_fmaf(scale[e], r[e], shift[e]);
      }
      load_channels(scale, arguments_.stats.scale + channel);
      load_channels(shift, arguments_.stats.shift + channel);
      const auto raw = ptx::load_shared<PixelUnit>(at);
      const BnAct<float> op{0.0f};
      const auto made = rounded<T, kUnit>(
          [&](int e) { return op(widen(raw.value[e]), scale[e], shift[e], r[e]); });
      ptx::store_shared(at, made);
      const int32_t m = pixel_ + i * Pattern::kRowStep;
      if (mine && exists(m)) {
        auto* to = static_cast<T*>(arguments_.out) + m * arguments_.out_pixel + channel;
        ptx::store_global(reinterpret_cast<PixelUnit*>(to), made);
      }
    }
  }

 private:
  RF_DEVICE bool exists(int32_t m) const { return m < arguments_.stats.operands.grid.pixels; }

  const BlockEndArguments& arguments_;
  Left left_;
  Right right_;
  int32_t pixel_;   // this thread's first one
  int32_t filter_;  // likewise
  int32_t wanted_;  // first channel of the unit that is asked for next
  int32_t landed_;  // likewise of the one that arrives next
  int32_t ahead_;   // steps until the next one that this column stores
};

}  // namespace resnet_fused
