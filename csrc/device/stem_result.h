// The stem's results in registers, two a word, and their way out. What a thread keeps of them is
// rounded as it will be stored: the largest of rounded numbers is the largest, rounded.
#pragma once

#include <cstdint>

#include "../ptx/memory.h"
#include "e4m3.h"
#include "pair.h"
#include "stem_tile.h"
#include "vector.h"

namespace resnet_fused {

// Out: of 16 bits, what is stored.
template <class Out>
struct StemResult {
  using Kept = Out;
  using Eight = Vector<uint32_t>;
  static constexpr bool kServed = true;

  static RF_DEVICE uint32_t rounded(float first, float second) {
    return narrow_pair<Out>(first, second);
  }
  static RF_DEVICE Eight stored(const Vector<uint32_t>& kept) { return kept; }
  // Of a word's lower or upper half.
  static RF_DEVICE Out stored(uint32_t pair, int half) {
    return Out{static_cast<uint16_t>(pair >> 16 * half)};
  }
};

// Kept as halves, which hold every number of e4m3: their maximum is an instruction.
template <>
struct StemResult<Float8E4M3> {
  using Kept = Float16;
  struct alignas(8) Eight {
    uint32_t word[2];
  };
  static constexpr bool kServed = kConvertsE4M3;

#if defined(RF_CONVERTS_E4M3)
  static RF_DEVICE uint32_t rounded(float first, float second) {
    return e4m3_to_half_pair(narrow_e4m3_pair(first, second));
  }
  static RF_DEVICE Eight stored(const Vector<uint32_t>& kept) {
    Eight made;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      made.word[i] = half_to_e4m3_pair(kept.lane[2 * i]) | half_to_e4m3_pair(kept.lane[2 * i + 1])
                                                               << 16;
    }
    return made;
  }
  static RF_DEVICE Float8E4M3 stored(uint32_t pair, int half) {
    return Float8E4M3{static_cast<uint8_t>(half_to_e4m3_pair(pair) >> 8 * half)};
  }
#endif
};

// Stores eight filters of a pixel, as far as there are any left.
template <class Out>
RF_DEVICE void stem_store(Out* at, const Vector<uint32_t>& filters, const StemArguments& arguments,
                          int32_t left) {
  using Result = StemResult<Out>;
  if (arguments.wide_out) {
    if (left <= 0) return;
    ptx::store_global(reinterpret_cast<typename Result::Eight*>(at), Result::stored(filters));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= left) continue;
    ptx::store_global(at + i * arguments.out_c, Result::stored(filters.lane[i / 2], i % 2));
  }
}

}  // namespace resnet_fused
