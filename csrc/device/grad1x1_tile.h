// Tiles of conv_bn_grad1x1: rows of pixels with their channels side by side, each read both along
// its rows and across them.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_mask.h"
#include "mn_major.h"

namespace resnet_fused {

// Fragments of a warp's kBlocks blocks of 16 rows of an MN-major tile whose rows are M and along
// whose rows the reduction lies: what KMajorFragments are of tiles of 64 bytes a row.
template <class T, int kBlocks, int kColumns>
class RowFragments {
  using Layout = MnMajor<T, kColumns>;

 public:
  RF_DEVICE RowFragments(uint32_t first, uint32_t lane) {
    const uint32_t matrix = lane / 8;
    const uint32_t row = first + matrix % 2 * 8 + lane % 8;
    chunk_ = matrix / 2 ^ Layout::swizzle(row);
    place_ = row * Layout::kRowBytes;
  }

  RF_DEVICE void load(uint32_t (&fragments)[kBlocks][4], ptx::SharedAddress tile, int slice) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      // Sixteen rows further down the swizzle is the same.
      ptx::ldmatrix_x4(fragments[i], tile + place_ + i * (16 * Layout::kRowBytes) +
                                         (chunk_ ^ 2 * slice) * kChunkBytes);
    }
  }

 private:
  uint32_t chunk_;  // of the first slice, swizzled
  uint32_t place_;
};

// A thread's chunks of a tile [kRows][kColumns]: the same channels of rows that lie kRowStep apart.
template <class T, class Shape, int kRows, int kColumns>
class ThreadChunks {
  using Layout = MnMajor<T, kColumns>;

 public:
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kColumns / kUnit;
  static constexpr int kRowStep = Shape::kThreads / kLanes;
  static constexpr int kCount = kRows / kRowStep;
  using Chunk = Unit<T, kUnit>;
  static_assert(Shape::kThreads % kLanes == 0 && kRows % kRowStep == 0 && kRowStep % 8 == 0);

  RF_DEVICE explicit ThreadChunks(uint32_t thread)
      : row_(thread / kLanes), lane_(thread % kLanes) {}

  RF_DEVICE int32_t row(int i) const { return static_cast<int32_t>(row_ + i * kRowStep); }
  RF_DEVICE int32_t column() const { return static_cast<int32_t>(lane_) * kUnit; }
  RF_DEVICE ptx::SharedAddress at(ptx::SharedAddress tile, int i) const {
    return tile + Layout::offset(row_ + static_cast<uint32_t>(i) * kRowStep, lane_ * kChunkBytes);
  }

  // Asks for rows [first, end) of a tensor, whose rows lie `stride` elements apart; zeros beyond
  // and beside `columns`.
  RF_DEVICE void ask(ptx::SharedAddress tile, const T* from, int64_t stride, int32_t first,
                     int32_t end, int32_t columns) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t m = first + row(i);
      ptx::cp_async<kChunkBytes>(at(tile, i), from + m * stride + column(),
                                 m < end && column() < columns);
    }
  }

 private:
  uint32_t row_;
  uint32_t lane_;
};

}  // namespace resnet_fused
