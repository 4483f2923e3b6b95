// Split reductions of a launch whose blocks are all on the device at once: those that hold the
// parts of a tile leave their sums in a workspace, wait for one another, and each finishes some of
// the tile's rows. The parts are added in the order of merge_splits, so that it gives the same
// bits.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_act.h"
#include "conv_epilogue.h"
#include "conv_geometry.h"
#include "grid_barrier.h"
#include "main_loop.h"
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

// Four neighbouring channels of a pixel.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T lane[4];
};

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

// What becomes of the sums of four channels of a pixel, the first of them `column` of the tile's.
// All that it needs beside the sums is asked for first, so that it comes together with them.
template <class T, class Shape>
class QuadEpilogue {
 public:
  RF_DEVICE QuadEpilogue(const ConvBnActArguments& arguments, const Tile& tile, int m, int column)
      : output_(arguments.output), left_(output_.channels - tile.n * Shape::kN - column) {
    const int channel = tile.group * output_.channels + tile.n * Shape::kN + column;
    const Pixel pixel = pixel_of(m, arguments.operands.grid);
    out_ = static_cast<T*>(output_.out) + offset_of(pixel, output_.out_strides) +
           channel * output_.out_strides.k;
    if (output_.residual != nullptr) {
      load_residual(static_cast<const T*>(output_.residual) +
                    offset_of(pixel, output_.residual_strides) +
                    channel * output_.residual_strides.k);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = channel + (e < left_ ? e : 0);
      scale_[e] = ptx::load_global_read_only(output_.scale + at);
      shift_[e] = ptx::load_global_read_only(output_.shift + at);
    }
  }

  RF_DEVICE void finish(const Vector<float>& sum) const {
    const BnAct<float> op{output_.floor};
    Quad<T> result;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float y = output_.residual == nullptr
                          ? op(sum.lane[e], scale_[e], shift_[e])
                          : op(sum.lane[e], scale_[e], shift_[e], widen(added_.lane[e]));
      result.lane[e] = narrow<T>(y);
    }
    if (output_.wide_out) {
      ptx::store_global(reinterpret_cast<Quad<T>*>(out_), result);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < left_) ptx::store_global(out_ + e * output_.out_strides.k, result.lane[e]);
    }
  }

 private:
  RF_DEVICE void load_residual(const T* from) {
    if (output_.wide_residual) {
      added_ = ptx::load_global(reinterpret_cast<const Quad<T>*>(from));
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < left_) added_.lane[e] = ptx::load_global(from + e * output_.residual_strides.k);
    }
  }

  const ConvOutput& output_;
  int left_;  // channels that there are, from the first one on
  T* out_;
  Quad<T> added_{};
  float scale_[4];
  float shift_[4];
};

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
    const QuadEpilogue<T, Shape> epilogue(arguments, tile, m, column);
    epilogue.finish(sum_of_parts<Shape>(sums, splits, i));
  }
}

}  // namespace resnet_fused
