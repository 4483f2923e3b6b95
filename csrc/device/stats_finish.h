// How a block of conv_bn_stats ends, whatever its sums are of: with splits the last part adds them
// all up; the tile is stored and measured, and the last block of a column of tiles merges what the
// others have measured.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "gradient_epilogue.h"
#include "merge_moments.h"
#include "split_reduction.h"
#include "stats_epilogue.h"
#include "stats_geometry.h"

namespace resnet_fused {

// It is found anew wherever it is needed: from one such place to the next it would take registers
// that there are none of.
RF_DEVICE Tile tile_of_block(const ConvBnStatsArguments& arguments) {
  uint32_t block = blockIdx.x;
  ptx::keep(block);
  return tile_of(block, arguments.tiles);
}

// ring: kStatsSharedBytes, of which nobody reads any more. mine(): the tile, found anew.
template <class T, class Shape, class TileOf>
RF_DEVICE void finish_stats(Sums<Shape>& sums, const ConvBnStatsArguments& arguments,
                            ptx::SharedAddress ring, const TileOf& mine) {
  uint32_t thread = threadIdx.x;
  ptx::keep(thread);
  if (arguments.tiles.splits > 1) {
    const Tile part = mine();
    if (!merge_splits(sums, arguments.workspace, part.index, part.split, arguments.tiles.splits,
                      ring, thread)) {
      return;
    }
  }
  const Tile tile = mine();
  const auto place = Place<Shape>::of(thread);
  const OutputTile<T, Shape> output{ring, 0};
  const BandMoments<Shape> bands{ring + Shape::kRingBytes};
  const int32_t first_pixel = tile.m * Shape::kM;
  const int32_t pixels_left = arguments.operands.grid.pixels - first_pixel;
  const int32_t rows = pixels_left < Shape::kM ? pixels_left : Shape::kM;
  const int32_t first_column = tile.n * Shape::kN;
  const int32_t columns = arguments.channels - first_column;
  const int32_t channel = tile.group * arguments.channels + first_column;
  put_measured(output, bands, sums, place, rows, columns);
  ptx::sync_threads();
  store_rows(output, arguments.wide_y, arguments.pixels_lie_together, place.thread,
             [&](uint32_t row, uint32_t column) -> T* {
               if (static_cast<int32_t>(row) >= rows || static_cast<int32_t>(column) >= columns) {
                 return nullptr;
               }
               const Pixel pixel =
                   pixel_of(first_pixel + static_cast<int32_t>(row), arguments.operands.grid);
               return static_cast<T*>(arguments.y) + offset_of(pixel, arguments.y_strides) +
                      (channel + static_cast<int64_t>(column)) * arguments.y_strides.k;
             });
  const int32_t measured = arguments.measured.first_tile + tile.m;
  if (place.thread < Shape::kN && static_cast<int32_t>(place.thread) < columns) {
    const int64_t filters = int64_t{arguments.channels} * arguments.tiles.groups;
    ptx::store_global(arguments.moments + measured * filters + channel + place.thread,
                      moments_of_column(bands, place.thread, rows));
  }
  merge_moments<Shape>(
      arguments,
      {static_cast<uint32_t>(tile.group * arguments.tiles.tiles_n + tile.n), channel, columns},
      measured, ring, bands.first, place.thread);
}

// Of the block's only tile.
template <class T, class Shape>
RF_DEVICE void finish_stats(Sums<Shape>& sums, const ConvBnStatsArguments& arguments,
                            ptx::SharedAddress ring) {
  finish_stats<T>(sums, arguments, ring, [&] { return tile_of_block(arguments); });
}

}  // namespace resnet_fused
