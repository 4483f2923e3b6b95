// Pixels that lie in a ring, through the BatchNorm and ReLU of the layer before: one thread's part
// of so many of them, and of 64 channels of each.
#pragma once

#include <cstdint>

#include "conv_geometry.h"
#include "normed_operand.h"
#include "tma_conv.h"
#include "transform_ring.h"
#include "vector.h"

namespace resnet_fused {

// One value of each of a unit's channels; zeros of channels that are not `known`.
RF_DEVICE void load_known(float (&values)[kUnitChannels], const float* from, bool known) {
#pragma unroll
  for (int i = 0; i < kUnitChannels; i += kVectorLength<float>) {
    const auto part = known ? load_vector(from + i) : Vector<float>{};
#pragma unroll
    for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
  }
}

template <class T, int kRows>
class NormedRows {
  using Rows = TransformRows<kRows>;

 public:
  // thread: of those who transform.
  RF_DEVICE NormedRows(const NormedImages& images, uint32_t thread)
      : images_(images), rows_(thread) {}

  // Fetches scale and shift of the thread's channels. first: of the group, among all; c: where the
  // 64 begin in it, of so many. Channels behind the last one stay zeros, whatever shift lies there.
  RF_DEVICE void fetch(int32_t first, int32_t c, int32_t channels) {
    const int32_t mine = c + rows_.channel();
    const auto at = static_cast<uint32_t>(first + mine);  // one product, and no sum to be kept
    load_known(scale_, images_.scale + at, mine < channels);
    load_known(shift_, images_.shift + at, mine < channels);
  }

  // Finds which of the rows, output pixels from `first` on, a tap sees inside of their image; by
  // all lanes of a warp. read: the arguments of the convolution that reads them.
  template <class Arguments>
  RF_DEVICE void find_inside(const Arguments& read, const Column& tap, int32_t first) {
    const int32_t h = read.origin_h + tap.r * read.step_h;
    const int32_t w = read.origin_w + tap.s * read.step_w;
    inside_ = rows_.which([&](int32_t place) {
      const int32_t m = first + place;
      const Pixel pixel = pixel_of(m, read.grid);
      // As unsigned numbers those ahead of an image are beyond it.
      const auto row = static_cast<uint32_t>(pixel.p * read.stride_h + h);
      const auto column = static_cast<uint32_t>(pixel.q * read.stride_w + w);
      return m < read.grid.pixels && row < static_cast<uint32_t>(images_.height) &&
             column < static_cast<uint32_t>(images_.width);
    });
  }

  // Those rows, from `tile` on, a multiple of 1024; all of them before any have been found.
  RF_DEVICE void transform(ptx::SharedAddress tile) const {
    uint32_t inside = inside_;
    rows_.each(tile, [&](RowUnit& unit) {
      // What lies beside an image is zero behind the ReLU.
      const uint32_t kept = (inside & 1) != 0 ? ~0u : 0u;
      inside >>= 1;
      normalise_pairs<T>(unit.value, scale_, shift_);
#pragma unroll
      for (uint32_t& pair : unit.value) pair &= kept;
    });
  }

 private:
  const NormedImages& images_;
  Rows rows_;
  uint32_t inside_ = ~0u;
  float scale_[kUnitChannels];
  float shift_[kUnitChannels];
};

// Whether a tap of a pixel may lie beside its image.
template <class Arguments>
RF_DEVICE bool is_padded(const Arguments& read) {
  return read.origin_h < 0 || read.origin_w < 0;
}

}  // namespace resnet_fused
