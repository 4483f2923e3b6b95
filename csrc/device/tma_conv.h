// What conv_bn_act for sm_90a is told, the order of its tiles, and where each of its steps lies.
#pragma once

#include <cstdint>

#include "../ptx/tensor_map.h"
#include "block_walk.h"
#include "conv_geometry.h"
#include "divide.h"
#include "portable.h"

namespace resnet_fused {

// Tiles follow one another channels first, then groups, then pixels, so that the blocks that run at
// one time share pixels in L2; the weights are small.
struct TmaTiles {
  int32_t count;      // below 2^31
  Divisor of_pixels;  // tiles of channels, of all groups together
  Divisor of_group;   // of one group
};

// In tiles, but for the group.
struct TmaTile {
  int32_t pixels;
  int32_t group;
  int32_t channels;
};

RF_HOST_DEVICE TmaTile tile_of(int32_t index, const TmaTiles& tiles) {
  const uint32_t pixels = quotient(static_cast<uint32_t>(index), tiles.of_pixels);
  const uint32_t rest = static_cast<uint32_t>(index) - pixels * tiles.of_pixels.value;
  const uint32_t group = quotient(rest, tiles.of_group);
  return TmaTile{static_cast<int32_t>(pixels), static_cast<int32_t>(group),
                 static_cast<int32_t>(rest - group * tiles.of_group.value)};
}

struct ConvTmaArguments {
  ptx::TensorMap x;         // im2col {C, W, H, N}; with `dense` tiled {C, pixels}
  ptx::TensorMap weight;    // {C / groups, S, R, K}
  ptx::TensorMap residual;  // {K / groups, groups, pixels}
  ptx::TensorMap out;       // likewise
  const float* scale;       // [K]
  const float* shift;       // [K]
  Reduction reduction;      // a step is 128 bytes of the channels of one tap
  int32_t steps;            // of a tile
  int32_t channels;         // of a group's output
  PixelGrid grid;
  TmaTiles tiles;
  int32_t stride_h;  // of neighbouring output pixels
  int32_t stride_w;
  int32_t origin_h;  // of pixel (0, 0)'s first tap: minus the padding
  int32_t origin_w;
  int32_t step_h;  // of neighbouring taps: the dilation
  int32_t step_w;
  float floor;            // 0 for a ReLU, -infinity for none
  float residual_factor;  // of e4m3: what a stored 1 of the residual is worth
  float out_factor;       // and one over what a stored 1 of out is
  bool dense;             // a 1x1 filter over pixels that lie one behind the other
  bool has_residual;
  bool reverse;    // tiles are walked from the last one
  bool dependent;  // the next kernel may begin early
  bool follows;    // this one may: for the launch, the kernel waits either way
};

// The layer before, where a convolution reads through its BatchNorm and ReLU. Scale and shift lie
// at multiples of 16 bytes, and channels come in multiples of eight.
struct NormedImages {
  const float* scale;  // [channels of all groups]; null: pixels are read as they are
  const float* shift;  // likewise
  int32_t height;      // of an image
  int32_t width;
};

// The tiles of one block, one after the other.
class TileWalk : public BlockWalk {
 public:
  RF_HOST_DEVICE TileWalk(const TmaTiles& tiles, bool reverse, int32_t first, int32_t step)
      : BlockWalk(tiles.count, reverse, first, step), tiles_(tiles) {}

  RF_HOST_DEVICE TmaTile tile() const { return tile_of(index(), tiles_); }

 private:
  const TmaTiles& tiles_;
};

}  // namespace resnet_fused
