// Split reductions of a launch in clusters: the blocks that hold the parts of a tile are
// neighbours in one cluster. Each leaves its sums in its own shared memory, and behind a barrier of
// the cluster adds up those of all parts for its share of the tile's rows, in the order of
// merge_splits, so that it gives the same bits.
//
// A cluster's blocks have parts that follow one another, and 2, 4 or 8 parts make a tile: no tile
// lies in two clusters. All blocks of a cluster go through the same barriers, those without a part
// as well.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "conv_geometry.h"
#include "conv_tile.h"
#include "main_loop.h"
#include "network_layers.h"
#include "quad_epilogue.h"
#include "vector.h"

namespace resnet_fused {

// Where a sum of a tile lies: rows of kN floats. Units of eight channels change places with the
// row's two lowest bits: a warp's pairs of eight rows are stored to different banks, and what a
// thread reads are whole aligned vectors.
template <class Shape>
RF_DEVICE uint32_t place_of_sum(uint32_t row, uint32_t column) {
  static_assert(Shape::kN % 32 == 0, "the units that change places are in one row");
  return row * (Shape::kN * 4) + (column / 8 ^ row % 4) * 32 + column % 8 * 4;
}

// What one block finishes of a tile that is cut into 2, 4 or 8 parts: a thread has four channels of
// some of its rows.
template <class T, class Shape>
class ClusterShare {
  static constexpr int kQuads = Shape::kN / 4;
  static constexpr int kRowsAtOnce = Shape::kThreads / kQuads;
  static_assert(Shape::kThreads % kQuads == 0, "a thread's channels are the same in all rows");

  template <int kParts>
  static constexpr int kRounds = (Shape::kM / kParts + kRowsAtOnce - 1) / kRowsAtOnce;

 public:
  // Asks for scale, shift and the shortcut, when that may be read.
  RF_DEVICE void begin(const ConvBnActArguments& arguments, const Tile& tile) {
    first_ = tile.m * Shape::kM;
    const int rows = Shape::kM / arguments.tiles.splits;
    const int thread = static_cast<int>(threadIdx.x);
    row_ = tile.split * rows + thread / kQuads;
    const int column = thread % kQuads * 4;
    const int left = arguments.operands.grid.pixels - first_;
    end_ = (tile.split + 1) * rows < left ? (tile.split + 1) * rows : left;
    if (tile.n * Shape::kN + column >= arguments.output.channels) end_ = 0;
    if (row_ >= end_) return;
    channels_.load(arguments.output, tile, Shape::kN, column);
#pragma unroll
    for (int round = 0; round < kRounds<2>; ++round) {
      const int row = row_ + round * kRowsAtOnce;
      if (row >= end_) break;
      pixel_[round].load(arguments.output, arguments.operands.grid, channels_, first_ + row);
    }
  }

  // Behind the cluster's barrier. `sums`: where every block has left its own; `first`: the rank of
  // the block that has the tile's first part.
  RF_DEVICE void finish(const ConvBnActArguments& arguments, ptx::SharedAddress sums,
                        uint32_t first) const {
    const int parts = arguments.tiles.splits;
    if (parts == 2) add<2>(arguments, sums, first);
    if (parts == 4) add<4>(arguments, sums, first);
    if (parts == 8) add<8>(arguments, sums, first);
  }

 private:
  // All loads are under way before the first sum is added.
  template <int kParts>
  RF_DEVICE void add(const ConvBnActArguments& arguments, ptx::SharedAddress sums,
                     uint32_t first) const {
    Vector<float> value[kRounds<kParts>][kParts];
    const uint32_t column = threadIdx.x % kQuads * 4;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const ptx::SharedAddress from = ptx::cluster_address(sums, first + part);
#pragma unroll
      for (int round = 0; round < kRounds<kParts>; ++round) {
        const int row = row_ + round * kRowsAtOnce;
        if (row >= end_) break;
        value[round][part] = ptx::load_shared_cluster<Vector<float>>(
            from + place_of_sum<Shape>(static_cast<uint32_t>(row), column));
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds<kParts>; ++round) {
      const int row = row_ + round * kRowsAtOnce;
      if (row >= end_) break;
      Vector<float> sum{};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.lane[e] += value[round][part].lane[e];
      }
      pixel_[round].finish(arguments.output, arguments.operands.grid, channels_, first_ + row, sum);
    }
  }

  int first_ = 0;  // pixel of the tile
  int row_ = 0;    // of the tile, the thread's first one
  int end_ = 0;    // the share's, or where the tile's pixels or channels end
  QuadChannels channels_;
  QuadPixel<T> pixel_[kRounds<2>];
};

// How a network's kernel merges through the shared memory of its clusters.
class MergeByCluster {
 public:
  // room: for the sums of a tile, which are no part of the ring: the next tile's filters may come
  // while others read them.
  RF_DEVICE explicit MergeByCluster(ptx::SharedAddress room) : sums_(room) {}

  // As MergeByMemory's. The grid and the layer's first block are multiples of the cluster.
  template <class T, class Shape, LoadWidth kWidth, class Ready>
  RF_DEVICE void walk(const NetworkLayer& layer, uint32_t turn, bool& used, const Ready& ready) {
    const bool cut = layer.conv.tiles.splits > 1;
    const uint32_t rank = ptx::cluster_rank();
    // Where a layer is cut all blocks of a cluster walk as far as the first of them.
    uint32_t ahead = cut ? rank : 0;
#pragma unroll 1
    for (uint32_t part = turn; part - ahead < layer.parts; part += gridDim.x) {
      ClusterShare<T, Shape> share;
      uint32_t first = 0;
      if (part < layer.parts) {
        if (used) ptx::sync_threads();
        used = true;
        compute_tile<T, Shape, kWidth>(
            layer.conv, [&] { return part; },
            [&] {
              ready();
              if (!cut) return;
              const Tile tile = tile_of(part, layer.conv.tiles);
              first = rank - static_cast<uint32_t>(tile.split);
              share.begin(layer.conv, tile);
            },
            [&](const Sums<Shape>& sums, const Tile&, const Place<Shape>& place) {
              settle();
              put(sums, place);
              return false;
            });
      }
      if (!cut) continue;
      settle();
      ptx::cluster_arrive();
      ptx::cluster_wait();  // all have put theirs
      share.finish(layer.conv, sums_, first);
      ptx::cluster_arrive();  // this one has read the others'
      read_ = false;
    }
  }

  // Nobody may end while others read what it has put down.
  RF_DEVICE void leave() { settle(); }

 private:
  // Waits until all have read what this block has put down.
  RF_DEVICE void settle() {
    if (read_) return;
    ptx::cluster_wait();
    read_ = true;
  }

  template <class Shape>
  RF_DEVICE void put(const Sums<Shape>& sums, const Place<Shape>& place) const {
#pragma unroll
    for (int i = 0; i < 2 * Shape::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * Shape::kBlocksN; ++j) {
        const float (&sum)[4] = sums.value[i / 2][j];
        const uint32_t row = place.row + place.lane / 4 + i * 8;
        const uint32_t column = place.column + j * 8 + place.lane % 4 * 2;
        ptx::store_shared(sums_ + place_of_sum<Shape>(row, column),
                          Pair<float>{sum[i % 2 * 2], sum[i % 2 * 2 + 1]});
      }
    }
  }

  ptx::SharedAddress sums_;
  bool read_ = true;  // what this block has last put down, by all
};

}  // namespace resnet_fused
