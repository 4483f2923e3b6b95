// conv_bn_dgrad's loader: what has arrived of dz becomes BatchNorm's backward of it, in its place
// in shared memory, before others read.
//
// A thread turns what it has copied itself, so that no barrier is added, and each element once a
// step. What lies outside of the output stays the zero that it arrived as, not C.
#pragma once

#include <cstdint>

#include "bn_backward_operand.h"
#include "dgrad_loader.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
class AffineDgradLoader : public DgradLoader<T, Shape, kWidth> {
  using Base = DgradLoader<T, Shape, kWidth>;
  using Pattern = LoadPattern<T, Shape, kWidth>;
  using LeftUnit = Unit<T, Pattern::kUnit>;
  static constexpr int kRows = Shape::kM / Pattern::kRowStep;

 public:
  // `scale`: [3, K] A, B, C; at multiples of 16 bytes where channels are read wide.
  RF_DEVICE AffineDgradLoader(const ConvDgradArguments& arguments, const DgradPlace& place,
                              int32_t first_element, uint32_t thread)
      : Base(arguments, place, first_element, thread),
        coefficients_(arguments.scale),
        first_filter_(place.group * arguments.channels_out),
        filters_(arguments.channels_out * arguments.tiles.groups) {
    const auto lane = static_cast<int32_t>(thread % Pattern::kLanes);
    landed_ = column_of(first_element + lane * Pattern::kUnit, this->reduction());
  }

  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    if (!this->reads_y()) return;  // dz is the product's operand itself
#pragma unroll
    for (int pass = 0; pass < Pattern::kPasses; ++pass) {
      // Of units of two elements the second one may be another tap's.
      const Column behind = Pattern::kThroughRegisters
                                ? advanced(landed_, Column{1, 0, 0}, this->reduction())
                                : landed_;
      BackwardRows<Pattern::kUnit> rows;
      load(rows.a, 0, behind);
      load(rows.b, 1, behind);
      load(rows.c, 2, behind);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ptx::SharedAddress at = this->dy_at(stage, pass, i);
        auto unit = ptx::load_shared<LeftUnit>(at);
        apply_backward(unit, ptx::load_shared<LeftUnit>(this->y_at(stage, pass, i)), rows);
        if (!this->was_read(i, landed_)) {
          if constexpr (Pattern::kThroughRegisters) {
            unit.value[0] = T{};
          } else {
            unit = LeftUnit{};
          }
        }
        if constexpr (Pattern::kThroughRegisters) {
          if (!this->was_read(i, behind)) unit.value[1] = T{};
        }
        ptx::store_shared(at, unit);
      }
      landed_ = advanced(landed_, this->advance(), this->reduction());
    }
  }

 private:
  // Of the channels of the unit that has landed; behind the reduction's end those of any.
  RF_DEVICE void load(float (&values)[Pattern::kUnit], int row, const Column& behind) const {
    const float* from = coefficients_ + (first_filter_ + row * filters_);
    if constexpr (kWidth == LoadWidth::kWide) {
#pragma unroll
      for (int i = 0; i < Pattern::kUnit; i += kVectorLength<float>) {
        const auto part = load_vector(from + landed_.c + i);
#pragma unroll
        for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
      }
    } else {
      values[0] = ptx::load_global_read_only(from + landed_.c);
      if constexpr (Pattern::kUnit == 2) values[1] = ptx::load_global_read_only(from + behind.c);
    }
  }

  const float* coefficients_;
  int32_t first_filter_;  // of the group
  int32_t filters_;       // of all groups: from A to B, from B to C
  Column landed_;         // of this thread's unit of the pass that is turned next
};

}  // namespace resnet_fused
