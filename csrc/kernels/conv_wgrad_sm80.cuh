// conv_wgrad on the GPU, for sm_80 and later: the gradient of a convolution's weights.
//
//     dweight[k, e] = scale[k] * sum over m of dz[m, k] * pixel[m, e]
//
// M: output channels of a group, N: its taps and input channels, reduction: output pixels of the
// batch. That is a long reduction and a small result, so many blocks share a tile: each leaves its
// sums in a workspace, and a second kernel adds them in a fixed order.
#pragma once

#include <cstdint>

#include "../device/gradient_epilogue.h"
#include "../device/resident_blocks.h"
#include "../device/wgrad_loader.h"
#include "../device/wgrad_parts.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_wgrad_kernel(const __grid_constant__ ConvWgradArguments arguments) {
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  Sums<Shape> sums;
  sums.clear();
  {
    const auto place = Place<Shape>::mine();
    const Tile tile = tile_of(blockIdx.x, arguments.tiles);
    const WgradPart part = wgrad_part<T, Shape>(arguments, tile);
    WgradLoader<T, Shape, kWidth> loader(arguments, tile, part.first_pixel, place.thread);
    add_wgrad_products<T>(sums, loader, part.steps, ring, place);
  }
  // Found anew: kept through the loop, they would take registers that there are none of.
  uint32_t block = blockIdx.x, thread = threadIdx.x;
  ptx::keep(block);
  ptx::keep(thread);
  const Tile tile = tile_of(block, arguments.tiles);
  const auto place = Place<Shape>::of(thread);
  if (arguments.tiles.splits > 1) {
    leave_wgrad_sums(sums, arguments, tile, place.thread);
    return;
  }
  const int32_t row0 = tile.m * Shape::kM;
  const int32_t column0 = tile.n * Shape::kN;
  const OutputTile<T, Shape> output{ring, 0};
  put_rows(output, sums, place, [&](uint32_t row) {
    return scale_of(arguments, tile.group, row0 + static_cast<int32_t>(row));
  });
  ptx::sync_threads();
  store_rows(output, arguments.wide_dweight, false, place.thread,
             [&](uint32_t row, uint32_t column) {
               return dweight_at<T>(arguments, tile.group, row0 + static_cast<int32_t>(row),
                                    column0 + static_cast<int32_t>(column));
             });
}

}  // namespace resnet_fused
