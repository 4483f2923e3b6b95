// The end of a forward convolution for threads that have the sums of four neighbouring channels of
// a pixel: scale, shift, shortcut and ReLU in fp32, one rounding.
//
// What it needs beside the sums is asked for when its two parts are made, so that it comes while
// the sums are still on their way.
#pragma once

#include <cstdint>

#include "../ptx/memory.h"
#include "bn_act.h"
#include "conv_geometry.h"
#include "scalar.h"
#include "vector.h"

namespace resnet_fused {

// Four neighbouring channels of a pixel.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T lane[4];
};

// Scales and shifts of the four channels of which the first is `column` of the tile's.
struct QuadChannels {
  int left;     // of the channels that there are, from the first one on
  int channel;  // the first one, counted through all groups
  float scale[4];
  float shift[4];

  RF_DEVICE void load(const ConvOutput& output, const Tile& tile, int columns, int column) {
    left = output.channels - tile.n * columns - column;
    channel = tile.group * output.channels + tile.n * columns + column;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = channel + (e < left ? e : 0);
      scale[e] = ptx::load_global_read_only(output.scale + at);
      shift[e] = ptx::load_global_read_only(output.shift + at);
    }
  }
};

// The shortcut's part of one pixel, and the end of that pixel's sums.
template <class T>
class QuadPixel {
 public:
  RF_DEVICE void load(const ConvOutput& output, const PixelGrid& grid, const QuadChannels& of,
                      int m) {
    if (output.residual == nullptr) return;
    const T* from = static_cast<const T*>(output.residual) +
                    offset_of(pixel_of(m, grid), output.residual_strides) +
                    of.channel * output.residual_strides.k;
    if (output.wide_residual) {
      added_ = ptx::load_global(reinterpret_cast<const Quad<T>*>(from));
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < of.left) added_.lane[e] = ptx::load_global(from + e * output.residual_strides.k);
    }
  }

  RF_DEVICE void finish(const ConvOutput& output, const PixelGrid& grid, const QuadChannels& of,
                        int m, const Vector<float>& sum) const {
    const BnAct<float> op{output.floor};
    Quad<T> result;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float y = output.residual == nullptr
                          ? op(sum.lane[e], of.scale[e], of.shift[e])
                          : op(sum.lane[e], of.scale[e], of.shift[e], widen(added_.lane[e]));
      result.lane[e] = narrow<T>(y);
    }
    T* out = static_cast<T*>(output.out) + offset_of(pixel_of(m, grid), output.out_strides) +
             of.channel * output.out_strides.k;
    if (output.wide_out) {
      ptx::store_global(reinterpret_cast<Quad<T>*>(out), result);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < of.left) ptx::store_global(out + e * output.out_strides.k, result.lane[e]);
    }
  }

 private:
  Quad<T> added_{};
};

}  // namespace resnet_fused
