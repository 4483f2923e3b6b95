// The epilogue of conv_bn_stats: sums are rounded, put together in shared memory as rows, and
// measured as they were rounded.
//
// Each warp measures its own rows of a column, in registers: first their mean, then the squares
// around it, since sums of y^2 would lose them where the mean is large. Eight lanes hold a column's
// rows, so that three shuffles add a sum up; bands of warps meet in shared memory, in closed form.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_epilogue.h"
#include "main_loop.h"
#include "stats_geometry.h"
#include "vector.h"

namespace resnet_fused {

// The moments of a tile's columns by bands of warps, in shared memory: [kWarpsM][kN].
template <class Shape>
struct BandMoments {
  ptx::SharedAddress first;

  RF_DEVICE ptx::SharedAddress at(uint32_t band, uint32_t column) const {
    return first + (band * Shape::kN + column) * sizeof(Moments);
  }
};

// Rows of a band that exist, of `rows` rows of the tile.
template <class Shape>
RF_DEVICE int32_t rows_of_band(int32_t rows, int32_t band) {
  const int32_t left = rows - band * Shape::kWarpM;
  return left < 0 ? 0 : left < Shape::kWarpM ? left : Shape::kWarpM;
}

// The sum over the eight lanes that hold a column, in each of them.
RF_DEVICE float sum_of_column(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
    value += ptx::shuffle_xor(ptx::kWholeWarp, value, lanes);
  }
  return value;
}

// `rows`: of the tile that exist. Others are left out of the moments by their place: what a filter
// with a NaN has made of them is not 0. `columns`: likewise; of those behind them nothing is left.
template <class T, class Shape>
RF_DEVICE void put_measured(const OutputTile<T, Shape>& tile, const BandMoments<Shape>& moments,
                            const Sums<Shape>& sums, const Place<Shape>& place, int32_t rows,
                            int32_t columns) {
  constexpr int kRows = 2 * Shape::kBlocksM;  // of a thread
  const uint32_t row0 = place.row + place.lane / 4;
  const int32_t left = rows - static_cast<int32_t>(row0);
  const uint32_t band = place.row / Shape::kWarpM;
  const int32_t count = rows_of_band<Shape>(rows, static_cast<int32_t>(band));
  const float share = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
#pragma unroll
  for (int j = 0; j < 2 * Shape::kBlocksN; ++j) {
    // Also a branch, over which the compiler takes up no more columns than it has registers for.
    if (j % 2 == 0 && static_cast<int32_t>(place.column) + j * 8 >= columns) break;
    const uint32_t column = place.column + j * 8 + place.lane % 4 * 2;
    Pair<T> y[kRows];
    float total[2] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      y[i] = {narrow<T>(sums.value[i / 2][j][i % 2 * 2]),
              narrow<T>(sums.value[i / 2][j][i % 2 * 2 + 1])};
      ptx::store_shared(tile.element_at(row0 + i * 8, column), y[i]);
      if (i * 8 < left) {
        total[0] += widen(y[i].first);
        total[1] += widen(y[i].second);
      }
    }
    const float mean[2] = {sum_of_column(total[0]) * share, sum_of_column(total[1]) * share};
    float m2[2] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float off[2] = {widen(y[i].first) - mean[0], widen(y[i].second) - mean[1]};
      if (i * 8 < left) {
        m2[0] = __builtin_fmaf(off[0], off[0], m2[0]);
        m2[1] = __builtin_fmaf(off[1], off[1], m2[1]);
      }
    }
    m2[0] = sum_of_column(m2[0]);
    m2[1] = sum_of_column(m2[1]);
    if (place.lane < 4) {
      ptx::store_shared(moments.at(band, column), Vector<float>{{mean[0], m2[0], mean[1], m2[1]}});
    }
  }
}

// Of a column, over all bands; behind a barrier. The first one always has rows.
template <class Shape>
RF_DEVICE Moments moments_of_column(const BandMoments<Shape>& moments, uint32_t column,
                                    int32_t rows) {
  Moments band[Shape::kWarpsM];
  float count[Shape::kWarpsM];
  float shifted = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kWarpsM; ++i) {
    band[i] = ptx::load_shared<Moments>(moments.at(i, column));
    count[i] = static_cast<float>(rows_of_band<Shape>(rows, i));
    // Nothing of an empty one, whose mean is no number of this channel's.
    if (count[i] > 0.0f) shifted += count[i] * (band[i].mean - band[0].mean);
  }
  Moments all{band[0].mean + shifted / static_cast<float>(rows), 0.0f};
#pragma unroll
  for (int i = 0; i < Shape::kWarpsM; ++i) {
    const float off = band[i].mean - all.mean;
    if (count[i] > 0.0f) all.m2 += band[i].m2 + count[i] * off * off;
  }
  return all;
}

}  // namespace resnet_fused
