// Two neighbouring pixels of an image of a few channels, on their way into shared memory: 16 bytes,
// four channels a pixel, absent ones zero.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_geometry.h"
#include "image_shape.h"
#include "vector.h"

namespace resnet_fused {

constexpr int kImageChunkPixels = 2;
constexpr int kImageChunkElements = kImageChunkPixels * kImageChannels;

// How far a chunk's elements lie from its first one, in bytes.
template <class T>
struct ImageOffsets {
  int64_t of[kImageChunkElements];

  // pixel, channel: elements from one to the next.
  RF_DEVICE ImageOffsets(int64_t pixel, int64_t channel) {
#pragma unroll
    for (int e = 0; e < kImageChunkElements; ++e) {
      const int64_t elements = e / kImageChannels * pixel + e % kImageChannels * channel;
      of[e] = elements * static_cast<int64_t>(sizeof(T));
    }
  }
};

// The elements of a chunk that the image has, a bit for each: there(i) says of pixel i whether it
// is inside.
template <class There>
RF_DEVICE uint32_t image_elements(int32_t channels, const There& there) {
  const uint32_t of_pixel = (1u << channels) - 1;
  uint32_t known = 0;
#pragma unroll
  for (int i = 0; i < kImageChunkPixels; ++i) {
    if (there(i)) known |= of_pixel << i * kImageChannels;
  }
  return known;
}

// T: of 16 bits.
template <class T>
struct ImageChunk {
  T low[kImageChunkElements / 2];  // of the words that they become
  T high[kImageChunkElements / 2];

  // from: the first element; those that are not `known` are zero, and not read.
  RF_DEVICE void issue(const T* from, const ImageOffsets<T>& offsets, uint32_t known) {
    const auto* first = reinterpret_cast<const unsigned char*>(from);
#pragma unroll
    for (int e = 0; e < kImageChunkElements; ++e) {
      const auto* element = reinterpret_cast<const T*>(first + offsets.of[e]);
      T& half = (e % 2 == 0 ? low : high)[e / 2];
      half = (known >> e & 1) != 0 ? ptx::load_global_read_only(element) : T{};
    }
  }

  RF_DEVICE Vector<uint32_t> words() const {
    Vector<uint32_t> all;
#pragma unroll
    for (int e = 0; e < 4; ++e) all.lane[e] = low[e].bits | high[e].bits << 16;
    return all;
  }
};

}  // namespace resnet_fused
