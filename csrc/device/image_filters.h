// A tile's filters of an image, in shared memory: rows of taps, eight taps, four channels; zeros
// where a filter has nothing.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "image_shape.h"

namespace resnet_fused {

// [K, C, R, S], in elements.
struct ImageFilters {
  const void* weight;
  int32_t filters;
  int32_t channels;
  int32_t rows;
  int32_t taps;
  int64_t filter_stride;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t tap_stride;
};

// kFilters of them, from `first` on. Shape says in which order, and where a chunk of two taps lies.
template <class T, class Shape, uint32_t kFilters>
RF_DEVICE void stage_image_filters(const ImageFilters& filters, uint32_t first,
                                   ptx::SharedAddress at, uint32_t thread) {
  constexpr uint32_t kPairs = kImageTapChunks * kChunkBytes / 4;  // of channels, in a row
  const T* weight = static_cast<const T*>(filters.weight);
#pragma unroll 4
  for (uint32_t i = thread; i < kFilters * kImageTapRows * kPairs; i += Shape::kThreads) {
    const uint32_t pair = i % kPairs;
    const uint32_t tap = pair / 2;
    const uint32_t channel = pair % 2 * 2;
    const uint32_t place = i / kPairs % kFilters;
    const uint32_t row = i / (kPairs * kFilters);
    const uint32_t filter = first + Shape::filter_at(place);
    const T* from = weight + (filter * filters.filter_stride + channel * filters.channel_stride +
                              row * filters.row_stride + tap * filters.tap_stride);
    const bool there = filter < static_cast<uint32_t>(filters.filters) &&
                       row < static_cast<uint32_t>(filters.rows) &&
                       tap < static_cast<uint32_t>(filters.taps);
    uint32_t value = 0;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      if (there && channel + j < static_cast<uint32_t>(filters.channels)) {
        value |= ptx::load_global_read_only(from + j * filters.channel_stride).bits << 16 * j;
      }
    }
    ptx::store_shared(at + Shape::filter_place(place, row, pair / 4) + pair % 4 * 4, value);
  }
}

}  // namespace resnet_fused
