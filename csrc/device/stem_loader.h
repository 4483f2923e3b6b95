// The stem's image, from any layout and dtype into 16-bit rows of four channels a pixel.
//
// A thread brings a chunk, two pixels, of one row of a pair. Pixels outside of the image become
// zeros, without being read and behind `input_norm`; so do absent channels.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "pair.h"
#include "stem_tile.h"
#include "vector.h"

namespace resnet_fused {

// What a thread has of a pair on its way: the bits of its elements as they were loaded.
struct StemUnit {
  uint32_t bits[2][kStemChannels];
};

template <class T, class Shape>
class StemLoader {
 public:
  // norm: where input_norm lies in shared memory, [2][4] floats.
  RF_DEVICE StemLoader(const StemArguments& arguments, ptx::SharedAddress ring,
                       ptx::SharedAddress norm, uint32_t thread)
      : arguments_(arguments), norm_(norm), chunk_(thread % Shape::kSlots) {
    row_ = static_cast<int32_t>(thread / Shape::kSlots);
    place_ = ring + static_cast<uint32_t>(row_) * Shape::kRowBytes + Shape::chunk_place(chunk_);
  }

  RF_DEVICE void begin(const StemItem& item) {
    const int32_t column = 2 * item.first_column - 2;  // of the convolution
    row0_ = (2 * item.first_row - 1) * kStemStride - arguments_.padding_h + row_;
    column0_ = column * kStemStride - arguments_.padding_w + 2 * static_cast<int32_t>(chunk_);
    n_ = item.n;
  }

  RF_DEVICE void issue(StemUnit& unit, int32_t pair) const {
    switch (arguments_.image) {
      case StemImage::kBytes:
        return issue_as<uint8_t>(unit, pair);
      case StemImage::kFloat:
        return issue_as<float>(unit, pair);
      case StemImage::kWeights:
        return issue_as<T>(unit, pair);
    }
  }

  RF_DEVICE void land(const StemUnit& unit, int32_t pair) const {
    if (chunk_ >= Shape::kChunks) return;
    const auto factor = ptx::load_shared<Vector<float>>(norm_);
    const auto added = ptx::load_shared<Vector<float>>(norm_ + sizeof(Vector<float>));
    Vector<uint32_t> chunk;
#pragma unroll
    for (int i = 0; i < 2 * kStemChannels; i += 2) {
      const int c = i % kStemChannels;
      const uint32_t (&bits)[kStemChannels] = unit.bits[i / kStemChannels];
      const float first = __builtin_fmaf(factor.lane[c], value_of(bits[c]), added.lane[c]);
      const float second =
          __builtin_fmaf(factor.lane[c + 1], value_of(bits[c + 1]), added.lane[c + 1]);
      const uint32_t both = narrow_pair<T>(first, second);
      chunk.lane[i / 2] = there(pair, i / kStemChannels) ? both : 0;
    }
    const uint32_t slot = static_cast<uint32_t>(pair) % Shape::kPairs;
    ptx::store_shared(place_ + slot * (2 * Shape::kRowBytes), chunk);
  }

 private:
  template <class V>
  static RF_DEVICE uint32_t bits_of(V value) {
    if constexpr (sizeof(V) == 4) {
      return __builtin_bit_cast(uint32_t, value);
    } else if constexpr (sizeof(V) == 2) {
      return value.bits;
    } else {
      return value;
    }
  }

  // Whether pixel i of the thread's chunk lies in the image.
  RF_DEVICE bool there(int32_t pair, int32_t i) const {
    const auto h = static_cast<uint32_t>(row0_ + 2 * pair);
    const auto w = static_cast<uint32_t>(column0_ + i);
    return h < static_cast<uint32_t>(arguments_.height) &&
           w < static_cast<uint32_t>(arguments_.width) && chunk_ < Shape::kChunks;
  }

  template <class V>
  RF_DEVICE void issue_as(StemUnit& unit, int32_t pair) const {
    // Worked out anew for each pair: registers are scarce, and this is once a row.
    const V* from =
        static_cast<const V*>(arguments_.x) +
        (n_ * arguments_.x_n + (row0_ + 2 * pair) * arguments_.x_h + column0_ * arguments_.x_w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < kStemChannels; ++c) {
        const V* at = from + (i * arguments_.x_w + c * arguments_.x_c);
        const bool known = there(pair, i) && c < arguments_.channels;
        // Not by the path for what nobody writes: the kernel ahead may have written it meanwhile.
        unit.bits[i][c] = known ? bits_of(ptx::load_global(at)) : 0;
      }
    }
  }

  RF_DEVICE float value_of(uint32_t bits) const {
    switch (arguments_.image) {
      case StemImage::kBytes:
        return static_cast<float>(bits);
      case StemImage::kFloat:
        return __builtin_bit_cast(float, bits);
      case StemImage::kWeights:
        break;
    }
    return widen(T{static_cast<uint16_t>(bits)});
  }

  const StemArguments& arguments_;
  ptx::SharedAddress norm_;
  uint32_t chunk_;
  int32_t row_;  // of the pair
  ptx::SharedAddress place_;
  int32_t row0_;
  int32_t column0_;
  int32_t n_;
};

}  // namespace resnet_fused
