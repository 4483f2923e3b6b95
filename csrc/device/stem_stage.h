// What the stem's kernels bring to shared memory once: a block's filters, and vectors.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "image_filters.h"
#include "stem_tile.h"

namespace resnet_fused {

// The block's filters in shared memory: 64. Shape says in which order, and where a chunk of two
// taps lies.
template <class T, class Shape>
RF_DEVICE void stem_stage_filters(const StemArguments& arguments, uint32_t first,
                                  ptx::SharedAddress at, uint32_t thread) {
  const ImageFilters filters{arguments.weight, arguments.filters, arguments.channels,
                             kStemTaps,        kStemTaps,         arguments.w_k,
                             arguments.w_c,    arguments.w_r,     arguments.w_s};
  stage_image_filters<T, Shape, kStemFilters>(filters, first, at, thread);
}

// input_norm, as the shape says; without it x * 1 + 0.
template <class Shape>
RF_DEVICE void stem_stage_norm(const StemArguments& arguments, ptx::SharedAddress at,
                               uint32_t thread) {
  if (thread >= 2 * kStemChannels) return;
  const auto c = static_cast<int32_t>(thread % kStemChannels);
  float value = thread < kStemChannels ? 1.0f : 0.0f;
  if (arguments.norm != nullptr && c < arguments.channels) {
    value = ptx::load_global_read_only(arguments.norm + c +
                                       (thread < kStemChannels ? 0 : arguments.channels));
  }
  ptx::store_shared(at + 2 * Shape::kScaleBytes + thread * 4, value);
}

// Likewise, and scale and shift of the block's filters, in units of the result.
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
  stem_stage_norm<Shape>(arguments, at, thread);
}

}  // namespace resnet_fused
