// The moments of a channel's tiles become those of all its pixels, chunk after chunk; see
// merge_chunks.h.
//
// In closed form, in float64, around the first part's mean p (Chan, Golub and LeVeque, "Algorithms
// for computing the sample variance", formula 2.1, for many parts at a time):
//
//     d_i = mean_i - p;  S = sum n_i d_i;  Q = sum (M2_i + n_i d_i^2)
//     mean = p + S / n;  M2 = Q - S^2 / n
//
// The subtraction is harmless: of t parts Q is at most (1 + t) M2, which float64 has the bits for.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "finish_channels.h"
#include "merge_chunks.h"
#include "stats_geometry.h"

namespace resnet_fused {

// One part more, of so many pixels.
RF_DEVICE void add_around(double pivot, double pixels, double mean, double m2, ColumnSums& into) {
  const double off = mean - pivot;
  into.first += pixels * off;
  into.second += m2 + pixels * off * off;
}

RF_DEVICE WideMoments moments_around(double pivot, double pixels, const ColumnSums& sums) {
  const double m2 = sums.second - sums.first * sums.first / pixels;
  return WideMoments{pivot + sums.first / pixels, m2 < 0.0 ? 0.0 : m2};
}

// Merges the parts first <= i < last of this thread's column, as sum_parts does. load(i): the
// moments of part i; before(i): pixels of all parts ahead of it.
template <class Shape, class Load, class Before>
RF_DEVICE WideMoments merge_parts(int32_t first, int32_t last, ptx::SharedAddress scratch,
                                  uint32_t thread, const Load& load, const Before& before) {
  const double pivot = load(first).mean;
  const ColumnSums sums = sum_parts<Shape>(
      first, last, scratch, thread, load, [&](ColumnSums& into, int32_t i, const auto& part) {
        add_around(pivot, static_cast<double>(before(i + 1) - before(i)), part.mean, part.m2, into);
      });
  return moments_around(pivot, static_cast<double>(before(last) - before(first)), sums);
}

// Behind the moments of this block's tile, which it has stored. `ring` and `scratch`: shared memory
// that nobody else uses any more, 16 bytes a thread and 4 bytes. Arguments: of a kernel that
// measures; see stats_geometry.h and stats_walk.h.
template <class Shape, class Arguments>
RF_DEVICE void merge_moments(const Arguments& arguments, const MeasuredColumn& where, int32_t tile,
                             ptx::SharedAddress ring, ptx::SharedAddress scratch, uint32_t thread) {
  const auto& measured = arguments.measured;
  const int32_t filters = arguments.filters();
  const TileChunks chunks{measured.count()};
  const auto column = static_cast<int32_t>(thread % Shape::kN);
  const bool known = column < where.columns;
  const bool writes = known && thread < Shape::kN;
  // Of a column that does not exist the first one's, for nobody.
  const int64_t channel = where.channel + (known ? column : 0);
  merge_chunks<Shape>(
      arguments.arrivals + where.index * static_cast<uint32_t>(chunks.count() + 1), chunks, tile,
      scratch, thread,
      [&](int32_t first, int32_t last) {
        return merge_parts<Shape>(
            first, last, ring, thread,
            [&](int32_t i) {
              return ptx::load_global(arguments.moments + int64_t{i} * filters + channel);
            },
            [&](int32_t i) { return measured.before(i); });
      },
      [&](int32_t chunk, const WideMoments& all) {
        if (writes) ptx::store_global(arguments.merged + int64_t{chunk} * filters + channel, all);
      },
      [&](int32_t count) {
        return merge_parts<Shape>(
            0, count, ring, thread,
            [&](int32_t i) {
              return ptx::load_global(arguments.merged + int64_t{i} * filters + channel);
            },
            [&](int32_t i) { return measured.before(chunks.begin(i)); });
      },
      [&](const WideMoments& all) {
        finish_channels<Shape>(arguments, all, channel, writes, scratch, thread);
      });
}

}  // namespace resnet_fused
