// conv_dgrad on the GPU, for sm_80 and later: the gradient of a convolution's input, ReLU's mask
// and BatchNorm's scale applied to what has been copied, before it is multiplied.
//
//     dx[m, c] = sum over e of (scale * dz)[m, e] * filter[e, c]
//
// M: input pixels of one phase of the stride, N: input channels of a group, reduction: the phase's
// taps and the group's output channels. A phase without taps has no steps: its pixels are zeros.
#pragma once

#include <cstdint>

#include "../device/dgrad_loader.h"
#include "../device/dgrad_product.h"
#include "../device/gradient_epilogue.h"
#include "../device/gradient_geometry.h"
#include "../device/resident_blocks.h"
#include "../device/split_reduction.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_dgrad_kernel(const __grid_constant__ ConvDgradArguments arguments) {
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  Sums<Shape> sums;
  sums.clear();
  {
    const Tile tile = tile_of(blockIdx.x, arguments.tiles);
    const auto where = DgradPlace::of<Shape>(tile, arguments);
    add_gradients<T, Shape, kWidth, MaskedDgradLoader<T, Shape, kWidth>>(sums, arguments, where,
                                                                         tile.split, ring, place);
  }
  // Found again: across the loop they would take registers that there are none of.
  uint32_t block = blockIdx.x;
  ptx::keep(block);
  const Tile tile = tile_of(block, arguments.tiles);
  const auto where = DgradPlace::of<Shape>(tile, arguments);
  if (arguments.tiles.splits > 1 && !merge_splits(sums, arguments.workspace, tile.index, tile.split,
                                                  arguments.tiles.splits, ring, place.thread)) {
    return;
  }
  const OutputTile<T, Shape> output{ring, 0};
  put_rows(output, sums, place, [](uint32_t) { return 1.0f; });
  ptx::sync_threads();
  store_rows(output, arguments.wide_dx, arguments.pixels_lie_together, place.thread,
             [&](uint32_t row, uint32_t column) -> T* {
               const int32_t m = where.m + static_cast<int32_t>(row);
               const int32_t c = where.n + static_cast<int32_t>(column);
               if (m >= arguments.grid.pixels || c >= arguments.channels_in) return nullptr;
               Pixel pixel = pixel_of(m, arguments.grid);
               pixel.p = pixel.p * arguments.h.stride + where.h.index;
               pixel.q = pixel.q * arguments.w.stride + where.w.index;
               if (pixel.p >= arguments.h.size || pixel.q >= arguments.w.size) return nullptr;
               return static_cast<T*>(arguments.dx) + offset_of(pixel, arguments.dx_strides) +
                      (where.group * arguments.channels_in + c) * arguments.dx_strides.k;
             });
}

}  // namespace resnet_fused
