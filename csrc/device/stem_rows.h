// The stem's image for sm_90a, row by row, into 16-bit pixels of four channels.
//
// A thread brings chunks, two pixels each, of every row of a strip. Pixels outside of the image
// become zeros, without being read and behind `input_norm`; so do absent channels. What depends on
// the strip alone is worked out once: the warps that load share their schedulers with those that
// multiply.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "pair.h"
#include "stem_warpgroup.h"
#include "vector.h"

namespace resnet_fused {

// What a thread has of a row on its way: the bits of its elements as they were loaded, and which of
// its pixels lie in the image.
template <class Shape>
struct StemUnits {
  static constexpr int kPixels = 2 * Shape::kUnits;
  uint32_t bits[kPixels][kStemChannels];
  uint32_t there;
};

// V: the image's elements.
template <class V, class T, class Shape>
class StemRows {
  using Units = StemUnits<Shape>;

 public:
  // norm: where input_norm lies in shared memory, [2][4] floats; thread: of those that load.
  RF_DEVICE StemRows(const StemArguments& arguments, ptx::SharedAddress norm, uint32_t thread)
      : arguments_(arguments),
        thread_(thread),
        factor_(ptx::load_shared<Vector<float>>(norm)),
        added_(ptx::load_shared<Vector<float>>(norm + sizeof(Vector<float>))) {}

  // The next row is a strip's first.
  RF_DEVICE void enter(const StemStrip& strip) {
    row_ = strip.row * kStemStride - arguments_.padding_h;
    const int32_t column =
        strip.column * kStemStride - arguments_.padding_w + 2 * static_cast<int32_t>(thread_);
    from_ = static_cast<const V*>(arguments_.x) +
            (strip.n * arguments_.x_n + row_ * arguments_.x_h + column * arguments_.x_w);
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < Units::kPixels; ++i) {
      const auto w = static_cast<uint32_t>(column + pixel(i));
      const bool known = w < static_cast<uint32_t>(arguments_.width) && has(i / 2);
      inside_ |= static_cast<uint32_t>(known) << i;
    }
  }

  RF_DEVICE void issue(Units& units) {
    units.there =
        static_cast<uint32_t>(row_) < static_cast<uint32_t>(arguments_.height) ? inside_ : 0u;
    const V* from = from_;
#pragma unroll
    for (int c = 0; c < kStemChannels; ++c, from += arguments_.x_c) {
#pragma unroll
      for (int i = 0; i < Units::kPixels; ++i) units.bits[i][c] = 0;
      if (c >= arguments_.channels) continue;
#pragma unroll
      for (int i = 0; i < Units::kPixels; ++i) {
        if ((units.there >> i & 1) == 0) continue;
        // Not by the path for what nobody writes: the kernel ahead may have written it meanwhile.
        units.bits[i][c] = bits_of(ptx::load_global(from + pixel(i) * arguments_.x_w));
      }
    }
    from_ += arguments_.x_h;
    ++row_;
  }

  // to: where the row begins in shared memory.
  RF_DEVICE void land(const Units& units, ptx::SharedAddress to) const {
#pragma unroll
    for (int i = 0; i < Shape::kUnits; ++i) {
      if (!has(i)) continue;
      Vector<uint32_t> chunk;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = j % 2 * 2;
        const uint32_t (&bits)[kStemChannels] = units.bits[2 * i + j / 2];
        const uint32_t both = narrow_pair<T>(value_of(bits[c], c), value_of(bits[c + 1], c + 1));
        chunk.lane[j] = (units.there >> (2 * i + j / 2) & 1) != 0 ? both : 0u;
      }
      const ptx::SharedAddress place = to + (thread_ + i * kStemProducerThreads) * kChunkBytes;
      ptx::store_shared(place, chunk);
      // Once more as a window's last chunk, without the eighth tap's pixel.
      chunk.lane[2] = chunk.lane[3] = 0;
      ptx::store_shared(place + Shape::kTailsAt, chunk);
    }
  }

 private:
  // Pixels from the thread's first one to its i-th.
  static constexpr RF_DEVICE int32_t pixel(int i) {
    return i / 2 * (2 * kStemProducerThreads) + i % 2;
  }
  // Whether there is a chunk for the thread.
  RF_DEVICE bool has(int unit) const {
    return thread_ + unit * kStemProducerThreads < static_cast<uint32_t>(Shape::kChunks);
  }

  static RF_DEVICE uint32_t bits_of(V value) {
    if constexpr (sizeof(V) == 4) {
      return __builtin_bit_cast(uint32_t, value);
    } else if constexpr (sizeof(V) == 2) {
      return value.bits;
    } else {
      return value;
    }
  }
  RF_DEVICE float value_of(uint32_t bits, int c) const {
    float value;
    if constexpr (sizeof(V) == 4) {
      value = __builtin_bit_cast(float, bits);
    } else if constexpr (sizeof(V) == 2) {
      value = widen(T{static_cast<uint16_t>(bits)});
    } else {
      value = static_cast<float>(bits);
    }
    return __builtin_fmaf(factor_.lane[c], value, added_.lane[c]);
  }

  const StemArguments& arguments_;
  uint32_t thread_;
  Vector<float> factor_;
  Vector<float> added_;
  int32_t row_ = 0;  // of the image
  const V* from_ = nullptr;
  uint32_t inside_ = 0;
};

}  // namespace resnet_fused
