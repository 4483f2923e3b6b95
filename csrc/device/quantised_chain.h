// A chain of convolutions on sm_90a whose tensors are e4m3. Beside chain_types.h.
//
// As wgmma lays out 8-bit operands, a thread's left side is four neighbours of 16 channels; of sums
// it has two pairs of columns, eight apart. So a tile's filters come with every second pair of them
// first: column 8 i + 2 t + e of a half h has channel 16 i + 4 t + 2 h + e, and what a thread makes
// of a row's 16 channels are the bytes 4 t to 4 t + 3 of it, a word.
#pragma once

#include <cstdint>

#include "chain_types.h"
#include "e4m3.h"
#include "quantised_epilogue.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// 64 pixels' rows of 64 bytes in a box, with a swizzle as wide, and a thread's words in it.
class ChainBytes {
  static constexpr int kRowBytes = kStepElements;

 public:
  // thread: of the warpgroup.
  RF_DEVICE ChainBytes(ptx::SharedAddress start, uint32_t thread) {
    const uint32_t g = thread % 32 / 4;
    // Chunks of 16 bytes change places by the row's number in four pairs.
    place_ = start + (thread / 32 * 16 + g) * kRowBytes + g / 2 * 16 + thread % 4 * 4;
  }

  // Of channels 16 i to 16 i + 15, a word of each of two rows.
  RF_DEVICE void load(uint32_t (&words)[2], int i) const {
#pragma unroll
    for (int side = 0; side < 2; ++side) words[side] = ptx::load_shared<uint32_t>(at(i, side));
  }
  RF_DEVICE void store(int i, const uint32_t (&words)[2]) const {
#pragma unroll
    for (int side = 0; side < 2; ++side) ptx::store_shared(at(i, side), words[side]);
  }

 private:
  RF_DEVICE ptx::SharedAddress at(int i, int side) const {
    return (place_ ^ (i * 16)) + side * 8 * kRowBytes;
  }

  ptx::SharedAddress place_;
};

template <>
struct ChainTypes<Float8E4M3> {
  using Box = ChainBytes;
  using Act = ScaledBnAct;
  static constexpr int kRowBytes = kStepElements;
  static constexpr int kWords = 2;
  using Words = uint32_t[kWords];
  using Operand = uint32_t[kRowBytes / kProductBytes][4];
  // 128 products, as conv_bn_act_fp8 adds them up: the same bits.
  static constexpr int kStepsOfPart = kElementsOfStep<Float8E4M3> / kStepElements;

  static RF_DEVICE Act act(float floor, float residual_factor, float out_factor) {
    return {floor, residual_factor, out_factor};
  }

  template <int kRegisters>
  static RF_DEVICE constexpr int sum_at(int box, int i, int m) {
    return m / 2 * (kRegisters / 2) + box * (kBoxSums / 2) + 4 * i + 2 * (m % 2);
  }
  static RF_DEVICE constexpr uint32_t pair_at(int i, int half, uint32_t t) {
    return 8 * i + 2 * t + half;
  }

  static RF_DEVICE FloatPair added(const Words& words, int m) {
    return widen_e4m3_pair(words[m % 2] >> (m / 2 * 16) & 0xFFFF);
  }
  static RF_DEVICE void put(Words& words, int m, FloatPair y) {
    const uint32_t pair = narrow_e4m3_pair(y.low, y.high);
    words[m % 2] = m < 2 ? pair : words[m % 2] | pair << 16;
  }
  static RF_DEVICE FloatPair stored(FloatPair y) {
    return widen_e4m3_pair(narrow_e4m3_pair(y.low, y.high));
  }

  // The map's dimensions: channels, two filters, two of such pairs, fours.
  template <int kFilters, int kSharing>
  static RF_DEVICE void load_filters(ptx::SharedAddress to, const ptx::TensorMap* map,
                                     int32_t channel, int32_t first,
                                     ptx::SharedAddress barrier RF_SITE_PARAMETER) {
    static_assert(kSharing == 1, "each block brings its own");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::tma_load(to + half * (kFilters / 2 * kRowBytes), map, {channel, 0, half, first / 4},
                    barrier RF_SITE);
    }
  }
};

#endif

}  // namespace resnet_fused
