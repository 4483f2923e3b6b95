// A forward convolution's operands whose pixels are read through the BatchNorm and ReLU of the
// layer before: relu(scale * x + shift), rounded as if it had been stored.
//
// A thread turns what it has copied itself, in its place in shared memory, once its copies have
// landed and before others read: without a barrier of its own, and each element once a step. (On
// fragments each warp along N would do it again, through registers a copy could not be asked for
// so far ahead.) Taps that lie beside each other read an element again: up to nine times in a 3x3.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv_loader.h"
#include "normed_operand.h"
#include "stats_geometry.h"
#include "vector.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
class NormedLoader : public ConvLoader<T, Shape, kWidth> {
  using Base = ConvLoader<T, Shape, kWidth>;
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using PixelUnit = Unit<T, Pattern::kUnit>;
  static constexpr int kRows = Shape::kM / Pattern::kRowStep;

 public:
  // Scale and shift lie at multiples of 16 bytes where channels are read wide.
  RF_DEVICE NormedLoader(const ConvBnStatsArguments& arguments, const Tile& tile,
                         int32_t first_element, uint32_t thread)
      : Base(arguments.operands, tile, first_element, thread),
        arguments_(arguments),
        first_channel_(tile.group * arguments.operands.reduction.channels) {
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    landed_ = column_of(first_element + lane * Pattern::kUnit, arguments.operands.reduction);
  }

  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    const ConvOperands& operands = arguments_.operands;
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      // Of units of two elements the second one may be another tap's.
      const Column behind = Pattern::kThroughRegisters
                                ? advanced(landed_, operands.next, operands.reduction)
                                : landed_;
      float scale[Pattern::kUnit];
      float shift[Pattern::kUnit];
      load(scale, arguments_.scale, behind);
      load(shift, arguments_.shift, behind);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ptx::SharedAddress at = this->pixel_at(stage, pass, i);
        auto unit = ptx::load_shared<PixelUnit>(at);
        normalise(unit, scale, shift);
        // Zeros beyond the image stay zeros: padding is behind the ReLU.
        if (!this->was_read(i, landed_)) {
          if constexpr (Pattern::kThroughRegisters) {
            unit.value[0] = T{};
          } else {
            unit = PixelUnit{};
          }
        }
        if constexpr (Pattern::kThroughRegisters) {
          if (!this->was_read(i, behind)) unit.value[1] = T{};
        }
        ptx::store_shared(at, unit);
      }
      landed_ = advanced(landed_, operands.advance, operands.reduction);
    }
  }

 private:
  // Of the channels of the unit that has landed; behind the reduction's end those of any.
  RF_DEVICE void load(float (&values)[Pattern::kUnit], const float* from,
                      const Column& behind) const {
    if constexpr (kWidth == LoadWidth::kWide) {
      load_channels(values, from + first_channel_ + landed_.c);
    } else {
      values[0] = ptx::load_global_read_only(from + first_channel_ + landed_.c);
      if constexpr (Pattern::kUnit == 2) {
        values[1] = ptx::load_global_read_only(from + first_channel_ + behind.c);
      }
    }
  }

  const ConvBnStatsArguments& arguments_;
  int32_t first_channel_;  // of the group
  Column landed_;          // of this thread's unit of the pass that is turned next
};

}  // namespace resnet_fused
