// A warpgroup's chunks of a tile as TMA brings it: boxes of 64 channels behind one another, in each
// a row of 128 bytes for each pixel, with the swizzle of 128 bytes.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_mask.h"
#include "tile_shape.h"
#include "warpgroup_shape.h"

namespace resnet_fused {

// A thread has the same kUnit channels of rows that lie kRowStep apart.
template <class T, int kPixels, int kColumns>
class BoxedChunks {
 public:
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kColumns / kUnit;  // threads of a row
  static constexpr int kRowStep = kWarpgroupThreads / kLanes;
  static constexpr int kCount = kPixels / kRowStep;
  using Chunk = Unit<T, kUnit>;
  static_assert(kWarpgroupThreads % kLanes == 0 && kPixels % kRowStep == 0);

  // thread: of the warpgroup.
  RF_DEVICE explicit BoxedChunks(uint32_t thread)
      : row_(thread / kLanes), chunk_(thread % kLanes) {}

  RF_DEVICE int32_t row(int i) const { return static_cast<int32_t>(row_) + i * kRowStep; }
  RF_DEVICE int32_t column() const { return static_cast<int32_t>(chunk_) * kUnit; }
  RF_DEVICE ptx::SharedAddress at(ptx::SharedAddress tile, int i) const {
    constexpr uint32_t kBoxChunks = kStepRowBytes / kChunkBytes;
    const uint32_t row = row_ + static_cast<uint32_t>(i * kRowStep);
    return tile + chunk_ / kBoxChunks * (kPixels * kStepRowBytes) + row * kStepRowBytes +
           (chunk_ % kBoxChunks ^ row % kBoxChunks) * kChunkBytes;
  }

 private:
  uint32_t row_;
  uint32_t chunk_;
};

}  // namespace resnet_fused
