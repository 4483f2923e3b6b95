// Split reductions of a launch whose blocks are all on the device at once: those that hold the
// parts of a tile leave their sums in a workspace, wait for one another, and each finishes some of
// the tile's rows. The parts are added in the order of merge_splits, so that it gives the same
// bits.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "conv_geometry.h"
#include "conv_tile.h"
#include "grid_barrier.h"
#include "main_loop.h"
#include "network_layers.h"
#include "quad_epilogue.h"
#include "vector.h"

namespace resnet_fused {

// Where the sums of a tile's part lie: [kM][kN] floats.
template <class Shape>
RF_DEVICE float* sums_of(const ConvBnActArguments& arguments, const Tile& tile, int part) {
  const int64_t index = static_cast<int64_t>(tile.index) * arguments.tiles.splits + part;
  return arguments.workspace.partial + index * (Shape::kM * Shape::kN);
}

// Every thread of the block comes; then nobody reads its shared memory any more.
template <class Shape>
RF_DEVICE void leave_sums(const Sums<Shape>& sums, const ConvBnActArguments& arguments,
                          const Tile& tile, const Place<Shape>& place) {
  // Four lanes fill 32 bytes of a row, a sector.
  const uint32_t first =
      (place.row + place.lane / 4) * Shape::kN + place.column + place.lane % 4 * 2;
  float* mine = sums_of<Shape>(arguments, tile, tile.split) + first;
#pragma unroll
  for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * Shape::kBlocksN; ++j) {
      const float (&sum)[4] = sums.value[i / 2][j];
      ptx::store_global(reinterpret_cast<Pair<float>*>(mine + i * 8 * Shape::kN + j * 8),
                        Pair<float>{sum[i % 2 * 2], sum[i % 2 * 2 + 1]});
    }
  }
  count_block(arguments.workspace.arrivals + tile.index);
}

// Vector i of a tile's sums. The loads of many parts are under way at a time.
template <class Shape>
RF_DEVICE Vector<float> sum_of_parts(const float* sums, int splits, int i) {
  constexpr int kAtOnce = 16;
  const auto* from = reinterpret_cast<const Vector<float>*>(sums) + i;
  Vector<float> sum{};
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce) {
    Vector<float> value[kAtOnce];
#pragma unroll
    for (int part = 0; part < kAtOnce; ++part) {
      if (first + part >= splits) break;
      value[part] = ptx::load_global(from + (first + part) * (Shape::kM * Shape::kN / 4));
    }
#pragma unroll
    for (int part = 0; part < kAtOnce; ++part) {
      if (first + part >= splits) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.lane[e] += value[part].lane[e];
    }
  }
  return sum;
}

// Waits for all parts of the tile of `part`, and finishes the rows that are this part's share.
// Every thread of the block comes.
template <class T, class Shape>
RF_DEVICE void finish_share(const ConvBnActArguments& arguments, uint32_t part) {
  constexpr int kQuads = Shape::kN / 4;
  const Tile tile = tile_of(part, arguments.tiles);
  const int splits = arguments.tiles.splits;
  const int first = Shape::kM * tile.split / splits;
  const int last = Shape::kM * (tile.split + 1) / splits;
  const float* sums = sums_of<Shape>(arguments, tile, 0);
  await_blocks(arguments.workspace.arrivals + tile.index, static_cast<uint32_t>(splits));
#pragma unroll 1
  for (int i = first * kQuads + static_cast<int>(threadIdx.x); i < last * kQuads;
       i += Shape::kThreads) {
    const int m = tile.m * Shape::kM + i / kQuads;
    const int column = i % kQuads * 4;
    if (m >= arguments.operands.grid.pixels ||
        tile.n * Shape::kN + column >= arguments.output.channels) {
      continue;
    }
    QuadChannels channels;
    QuadPixel<T> pixel;
    channels.load(arguments.output, tile, Shape::kN, column);
    pixel.load(arguments.output, arguments.operands.grid, channels, m);
    pixel.finish(arguments.output, arguments.operands.grid, channels, m,
                 sum_of_parts<Shape>(sums, splits, i));
  }
}

// How a network's kernel merges through global memory.
class MergeByMemory {
 public:
  RF_DEVICE explicit MergeByMemory(ptx::SharedAddress /*room*/) {}

  // This block's parts of a layer: `turn`, and every gridDim.x-th behind it. `used`: whether
  // shared memory has been, since all threads of the block have last met. ready(): as compute_tile
  // has it.
  template <class T, class Shape, LoadWidth kWidth, class Ready>
  RF_DEVICE void walk(const NetworkLayer& layer, uint32_t turn, bool& used, const Ready& ready) {
#pragma unroll 1
    for (uint32_t part = turn; part < layer.parts; part += gridDim.x) {
      if (used) ptx::sync_threads();
      used = true;
      compute_tile<T, Shape, kWidth>(
          layer.conv, [&] { return part; }, ready,
          [&](const Sums<Shape>& sums, const Tile& tile, const Place<Shape>& place) {
            leave_sums(sums, layer.conv, tile, place);
            return false;
          });
    }
    if (layer.conv.tiles.splits == 1) return;
    // Behind all of the block's own parts: whoever waits has left nobody waiting for it.
#pragma unroll 1
    for (uint32_t part = turn; part < layer.parts; part += gridDim.x) {
      finish_share<T, Shape>(layer.conv, part);
    }
  }

  // Before the block ends.
  RF_DEVICE void leave() {}
};

}  // namespace resnet_fused
