// The walk of channel_walk.h, as a thread goes it.
#pragma once

#include <cstdint>

#include "channel_walk.h"
#include "vector.h"

namespace resnet_fused {

// kLength values that one instruction moves.
template <class T, int kLength>
struct alignas(kLength * sizeof(T)) Lanes {
  T lane[kLength];
};

// Where a thread stands.
struct WalkPlace {
  uint32_t group;
  uint32_t part;
  int64_t channel;  // its first one
  bool inside;      // whether there is such a channel
};

template <int kLength>
RF_DEVICE WalkPlace walk_place(const ChannelWalk& walk) {
  const uint32_t group = blockIdx.x % walk.groups;
  const int64_t column = static_cast<int64_t>(group) * blockDim.x + threadIdx.x;
  const int64_t channel = column * kLength;
  return {group, blockIdx.x / walk.groups, channel, channel < walk.channels};
}

// Both numbers below 2^32 are the rule, and divided by a fifth of the instructions.
RF_DEVICE int64_t divide_places(int64_t n, int64_t by) {
  if (((n | by) >> 32) == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(by);
  return n / by;
}

// A pixel's number in each of the loops. kDense: there is but one.
template <bool kDense>
struct WalkPixel {
  int64_t index[kDense ? 1 : 3];

  RF_DEVICE WalkPixel(const ChannelWalk& walk, int64_t pixel) {
    if constexpr (kDense) {
      index[0] = pixel;
    } else {
      const int64_t rest = divide_places(pixel, walk.inner[1]);
      index[2] = pixel - rest * walk.inner[1];
      index[0] = divide_places(rest, walk.inner[0]);
      index[1] = rest - index[0] * walk.inner[0];
    }
  }

  RF_DEVICE int64_t offset(const WalkOperand& operand) const {
    int64_t found = index[0] * operand.pixel[0];
    if constexpr (!kDense) found += index[1] * operand.pixel[1] + index[2] * operand.pixel[2];
    return found;
  }
};

// kLength per-channel values; those of 16-byte columns are whole vectors.
template <int kLength>
RF_DEVICE void load_values(const float* row, int64_t channel, float (&values)[kLength]) {
  constexpr int kPiece = kLength < 4 ? kLength : 4;
  using Piece = Lanes<float, kPiece>;
#pragma unroll
  for (int i = 0; i < kLength; i += kPiece) {
    const auto piece =
        ptx::load_global_read_only(reinterpret_cast<const Piece*>(row + channel + i));
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[i + j] = piece.lane[j];
  }
}

// Runs `pass` over a thread's pixels and stores what it makes into the result.
//
// Pass has Element, kLength, kReads, kMore (of walk_ahead), kPartial (an operand lacks channels)
// and operand(r), and is called with what those operands hold at a pixel. All loads of kAhead
// pixels come first, so that they are in flight together. Not by the read-only path: the result may
// be an operand, element for element.
template <class Pass, bool kDense>
RF_DEVICE void walk_pixels(const ChannelWalk& walk, const WalkPlace& at, Pass& pass) {
  using T = typename Pass::Element;
  using Found = Lanes<T, Pass::kLength>;
  constexpr int kAhead = walk_ahead(Pass::kReads, Pass::kMore || !kDense);
  const int64_t step = blockDim.y;
  const int64_t stride = step * kAhead * walk.parts;
  for (int64_t first = at.part * step * kAhead + threadIdx.y; first < walk.pixels;
       first += stride) {
    Found found[kAhead][Pass::kReads];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t pixel = first + i * step;
      if (pixel >= walk.pixels) break;
      const WalkPixel<kDense> place(walk, pixel);
#pragma unroll
      for (int r = 0; r < Pass::kReads; ++r) {
        const WalkOperand& operand = walk.operand[Pass::operand(r)];
        const int64_t channel = at.channel - operand.first;
        const T* from = static_cast<const T*>(operand.data) + channel * operand.channel;
        found[i][r] = Found{};
        if (!Pass::kPartial || (channel >= 0 && channel < operand.channels)) {
          found[i][r] =
              ptx::load_global(reinterpret_cast<const Found*>(from + place.offset(operand)));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t pixel = first + i * step;
      if (pixel >= walk.pixels) break;
      const WalkOperand& operand = walk.operand[kResult];
      T* to = static_cast<T*>(operand.data) + at.channel * operand.channel;
      const int64_t offset = WalkPixel<kDense>(walk, pixel).offset(operand);
      ptx::store_global(reinterpret_cast<Found*>(to + offset), pass(found[i]));
    }
  }
}

}  // namespace resnet_fused
