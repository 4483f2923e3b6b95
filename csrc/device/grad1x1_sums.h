// What a warpgroup of conv_bn_grad1x1 for sm_90a adds up over all of its steps, and how it leaves
// it. Channels are rows: a thread has those g and g + 8 of every 64.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "grad1x1_tma.h"
#include "scalar.h"

namespace resnet_fused {

template <class Shape>
struct Grad1x1Sums {
  float dweight[Shape::kBlocks][Shape::kFilters / 2];  // as wgmma leaves them
  // Of dx; of dx (x - mean), x being what the op's sums are against; of a third one likewise.
  float rows[Shape::kSumRows][Shape::kBlocks][2] = {};

  // A thread's channel of a block of 64, counted from the first of these on. thread: of the
  // warpgroup.
  static RF_DEVICE int32_t channel_of(uint32_t thread, int block, int side) {
    return block * kWarpgroupRows + static_cast<int32_t>(thread / 32 * 16 + thread % 32 / 4) +
           8 * side;
  }

  // Adds a slice of 16 pixels of block b, as it was rounded, against `below`.
  template <class T>
  RF_DEVICE void add(int b, const uint32_t (&passed)[4], const uint32_t (&below)[4],
                     const float (&mean)[2]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) rows[0][b][e / 2 % 2] += element<T>(passed, e);
    against<T, 1>(b, passed, below, mean);
  }
  template <class T>
  RF_DEVICE void add_third(int b, const uint32_t (&passed)[4], const uint32_t (&below)[4],
                           const float (&mean)[2]) {
    against<T, 2>(b, passed, below, mean);
  }

  RF_DEVICE void hand_over(ptx::SharedAddress to, uint32_t thread, bool summed) {
    each(summed, [&](const float& sum, int i) { ptx::store_shared(place_of(to, thread, i), sum); });
  }
  RF_DEVICE void take(ptx::SharedAddress from, uint32_t thread, bool summed) {
    each(summed,
         [&](float& sum, int i) { sum += ptx::load_shared<float>(place_of(from, thread, i)); });
  }

  // Stores a part's sums. first_channel: of the block.
  RF_DEVICE void leave(const Grad1x1Arguments& arguments, int32_t part, int32_t first_channel,
                       uint32_t thread, bool summed) {
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int32_t c = first_channel + channel_of(thread, b, side);
        const bool known = c < arguments.channels;
        if (known) leave_weights(arguments, b, side, part, c, thread);
        if (summed) leave_sums(arguments, b, side, part, c, known, thread);
      }
    }
  }

 private:
  static RF_DEVICE ptx::SharedAddress place_of(ptx::SharedAddress at, uint32_t thread, int i) {
    return at + (i * kWarpgroupThreads + thread) * static_cast<uint32_t>(sizeof(float));
  }

  template <class T>
  static RF_DEVICE float element(const uint32_t (&words)[4], int e) {
    return widen(T{static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)))});
  }
  template <class T, int kRow>
  RF_DEVICE void against(int b, const uint32_t (&passed)[4], const uint32_t (&below)[4],
                         const float (&mean)[2]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int side = e / 2 % 2;
      float& sum = rows[kRow][b][side];
      sum = __builtin_fmaf(element<T>(passed, e), element<T>(below, e) - mean[side], sum);
    }
  }

  // visit(sum, its number).
  template <class Visit>
  RF_DEVICE void each(bool summed, const Visit& visit) {
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < Shape::kFilters / 2; ++i) {
        visit(dweight[b][i], b * (Shape::kFilters / 2) + i);
      }
      if (!summed) continue;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int row = 0; row < Shape::kSumRows; ++row) {
          visit(rows[row][b][side], Shape::kSums + Shape::kSumRows * (2 * b + side) + row);
        }
      }
    }
  }

  RF_DEVICE void leave_weights(const Grad1x1Arguments& arguments, int b, int side, int32_t part,
                               int32_t c, uint32_t thread) const {
    auto k = static_cast<int32_t>(thread % 4 * 2);
    const int64_t channels = arguments.channels;
    float* to = arguments.partial + (int64_t{part} * arguments.filters + k) * channels + c;
#pragma unroll
    for (int j = 0; j < Shape::kFilters / 8; ++j) {
      if (k < arguments.filters) ptx::store_global(to, dweight[b][4 * j + 2 * side]);
      if (k + 1 < arguments.filters) {
        ptx::store_global(to + channels, dweight[b][4 * j + 2 * side + 1]);
      }
      k += 8;
      to += 8 * channels;
    }
  }

  // Over the four lanes that have a channel.
  RF_DEVICE void leave_sums(const Grad1x1Arguments& arguments, int b, int side, int32_t part,
                            int32_t c, bool known, uint32_t thread) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
      for (int row = 0; row < Shape::kSumRows; ++row) {
        rows[row][b][side] += ptx::shuffle_xor(ptx::kWholeWarp, rows[row][b][side], lanes);
      }
    }
    if (thread % 4 != 0 || !known) return;
    const int64_t count = arguments.sum_rows;
    float* to = arguments.partial_sums + count * part * arguments.channels + c;
#pragma unroll
    for (int row = 0; row < Shape::kSumRows; ++row, to += arguments.channels) {
      if (row < count) ptx::store_global(to, rows[row][b][side]);
    }
  }
};

}  // namespace resnet_fused
