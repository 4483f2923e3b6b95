// What the stem's kernels bring to shared memory once: a block's filters, and vectors.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "stem_tile.h"

namespace resnet_fused {

// The block's filters in shared memory: 64, rows of taps, eight taps, four channels; zeros where
// there is nothing. Shape says in which order, and where a chunk of two taps lies.
template <class T, class Shape>
RF_DEVICE void stem_stage_filters(const StemArguments& arguments, uint32_t first,
                                  ptx::SharedAddress at, uint32_t thread) {
  constexpr uint32_t kPairs = kStemWindowChunks * kChunkBytes / 4;  // of channels, in a row
  const T* weight = static_cast<const T*>(arguments.weight);
#pragma unroll 4
  for (uint32_t i = thread; i < kStemFilters * kStemTaps * kPairs; i += Shape::kThreads) {
    const uint32_t pair = i % kPairs;
    const uint32_t tap = pair / 2;
    const uint32_t channel = pair % 2 * 2;
    const uint32_t row = i / kPairs % kStemTaps;
    const uint32_t place = i / (kPairs * kStemTaps);
    const uint32_t filter = first + Shape::filter_at(place);
    const T* from = weight + (filter * arguments.w_k + channel * arguments.w_c +
                              row * arguments.w_r + tap * arguments.w_s);
    const bool there = filter < static_cast<uint32_t>(arguments.filters) && tap < kStemTaps;
    uint32_t value = 0;
#pragma unroll
    for (uint32_t j = 0; j < 2; ++j) {
      if (there && channel + j < static_cast<uint32_t>(arguments.channels)) {
        value |= ptx::load_global_read_only(from + j * arguments.w_c).bits << 16 * j;
      }
    }
    ptx::store_shared(at + Shape::filter_place(place, row, pair / 4) + pair % 4 * 4, value);
  }
}

// scale and shift of the block's filters, in units of the result, and input_norm, as the shape
// says; without it x * 1 + 0.
template <class Shape>
RF_DEVICE void stem_stage_factors(const StemArguments& arguments, uint32_t first,
                                  ptx::SharedAddress at, uint32_t thread) {
  if (thread < kStemFilters) {
    const bool there = first + thread < static_cast<uint32_t>(arguments.filters);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* from = (i == 0 ? arguments.scale : arguments.shift) + first + thread;
      const float value = there ? ptx::load_global_read_only(from) : 0.0f;
      ptx::store_shared(at + i * Shape::kScaleBytes + thread * 4, value * arguments.out_factor);
    }
  }
  if (thread < 2 * kStemChannels) {
    const auto c = static_cast<int32_t>(thread % kStemChannels);
    float value = thread < kStemChannels ? 1.0f : 0.0f;
    if (arguments.norm != nullptr && c < arguments.channels) {
      value = ptx::load_global_read_only(arguments.norm + c +
                                         (thread < kStemChannels ? 0 : arguments.channels));
    }
    ptx::store_shared(at + 2 * Shape::kScaleBytes + thread * 4, value);
  }
}

}  // namespace resnet_fused
