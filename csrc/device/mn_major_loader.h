// The loader of MN-major tiles: rows of the reduction, from global memory into a step's tile.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/ptx.h"
#include "conv_loader.h"
#include "mn_major.h"
#include "tile_shape.h"

namespace resnet_fused {

// Offsets along strides that count 16 bytes, for which 31 bits are enough, or elements.
template <LoadWidth kWidth>
using StrideOffset = std::conditional_t<kWidth == LoadWidth::kWide, int32_t, int64_t>;

template <class Offset>
RF_DEVICE Offset along(const Column& at, const ColumnStrides& strides) {
  return at.c * static_cast<Offset>(strides.c) + at.s * static_cast<Offset>(strides.s) +
         at.r * static_cast<Offset>(strides.r);
}

template <class T, LoadWidth kWidth>
RF_DEVICE const T* moved_by(const T* from, StrideOffset<kWidth> offset) {
  constexpr int kElements =
      kWidth == LoadWidth::kWide ? kChunkBytes / static_cast<int>(sizeof(T)) : 1;
  return from + int64_t{offset} * kElements;
}

// A thread's rows of a tile [kRowsOfStep][kColumns]: they lie kRowStep apart, and of each it brings
// the same 16 bytes or, of narrow operands, 4 bytes. One row after the other, the last row of a
// step is kRowStep before the first one of the next.
template <class T, class Shape, LoadWidth kWidth, int kColumns>
class MnMajorLoader {
  using Layout = MnMajor<T, kColumns>;

 public:
  static constexpr int kUnitBytes = kWidth == LoadWidth::kWide ? kChunkBytes : kNarrowBytes;
  static constexpr int kUnit = kUnitBytes / static_cast<int>(sizeof(T));  // elements
  static constexpr int kLanes = kColumns / kUnit;                         // threads along a row
  static constexpr int kRowsOfStep = Shape::kStepBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowStep = Shape::kThreads / kLanes;
  static constexpr int kRows = kRowsOfStep / kRowStep;
  static constexpr bool kThroughRegisters = kUnit == 2;
  static_assert(Shape::kThreads % kLanes == 0 && kRowsOfStep % kRowStep == 0);

  RF_DEVICE explicit MnMajorLoader(uint32_t thread) : thread_(thread) {}

  RF_DEVICE int32_t row() const { return static_cast<int32_t>(thread_ / kLanes); }
  // First element of this thread's unit, along the row.
  RF_DEVICE int32_t column() const { return static_cast<int32_t>(thread_ % kLanes) * kUnit; }

  // source(j): element j of the unit of this thread's row i; j is 0 but where two elements make a
  // unit.
  template <class SourceOf>
  RF_DEVICE void issue(ptx::SharedAddress tile, int i, const SourceOf& source) {
    if constexpr (kThroughRegisters) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Source<T> unit = source(j);
        word_[i][j] = unit.valid ? ptx::load_global_read_only(unit.from) : T{};
      }
    } else {
      const Source<T> unit = source(0);
      ptx::cp_async<kUnitBytes>(address(tile, i), unit.from, unit.valid);
    }
  }

  RF_DEVICE void land(ptx::SharedAddress tile) const {
    if constexpr (kThroughRegisters) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint32_t low = word_[i][0].bits;
        const uint32_t high = word_[i][1].bits;
        ptx::store_shared(address(tile, i), low | high << 16);
      }
    }
  }

  // Where this thread's unit of its row i lies.
  RF_DEVICE ptx::SharedAddress address(ptx::SharedAddress tile, int i) const {
    const uint32_t row = thread_ / kLanes + static_cast<uint32_t>(i) * kRowStep;
    return tile + Layout::offset(row, thread_ % kLanes * kUnitBytes);
  }

 private:
  uint32_t thread_;
  T word_[kThroughRegisters ? kRows : 1][2];
};

}  // namespace resnet_fused
