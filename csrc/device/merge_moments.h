// The moments of a channel's tiles become those of all its pixels, in a fixed order whichever
// blocks do it: the last block of each chunk of tiles merges the chunk, and the last of these the
// chunks.
//
// Both in closed form, in float64, around the first part's mean p (Chan, Golub and LeVeque,
// "Algorithms for computing the sample variance", formula 2.1, for many parts at a time):
//
//     d_i = mean_i - p;  S = sum n_i d_i;  Q = sum (M2_i + n_i d_i^2)
//     mean = p + S / n;  M2 = Q - S^2 / n
//
// The subtraction is harmless: of t parts Q is at most (1 + t) M2, which float64 has the bits for.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "stats_geometry.h"

namespace resnet_fused {

// Whether this block is the last one of `blocks` that arrive at a counter; then it may read what
// all of them wrote before. `scratch`: 4 bytes of shared memory that nobody else uses.
RF_DEVICE bool last_to_arrive(uint32_t* counter, int32_t blocks, ptx::SharedAddress scratch,
                              uint32_t thread) {
  ptx::fence_acq_rel_gpu();
  ptx::sync_threads();
  if (thread == 0) ptx::store_shared(scratch, ptx::atomic_add_acq_rel(counter, 1u));
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(scratch) + 1 != static_cast<uint32_t>(blocks)) return false;
  ptx::fence_acq_rel_gpu();
  return true;
}

// A column's sums over its parts.
struct alignas(16) MomentSums {
  double shifted;  // S
  double squares;  // Q
};

// Merges the parts first <= i < last of this thread's column, together with the other threads of
// that column, kLanes of them, who meet in shared memory at `scratch`. load(i): the moments of part
// i; before(i): pixels of all parts ahead of it. The result is the first thread's, thread < kN.
template <class Shape, class Load, class Before>
RF_DEVICE WideMoments merge_parts(int32_t first, int32_t last, ptx::SharedAddress scratch,
                                  uint32_t thread, const Load& load, const Before& before) {
  constexpr int kLanes = Shape::kThreads / Shape::kN;
  constexpr int kAtOnce = 8;  // loads under way
  static_assert(Shape::kThreads % Shape::kN == 0);
  const auto lane = static_cast<int32_t>(thread / Shape::kN);
  const double pivot = load(first).mean;
  MomentSums sums{};
  for (int32_t begin = first + lane; begin < last; begin += kLanes * kAtOnce) {
    decltype(load(first)) part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t at = begin + i * kLanes;
      part[i] = load(at < last ? at : first);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t at = begin + i * kLanes;
      if (at >= last) continue;
      const auto pixels = static_cast<double>(before(at + 1) - before(at));
      const double off = static_cast<double>(part[i].mean) - pivot;
      sums.shifted += pixels * off;
      sums.squares += static_cast<double>(part[i].m2) + pixels * off * off;
    }
  }
  if constexpr (kLanes > 1) {
    if (lane > 0) ptx::store_shared(scratch + (thread - Shape::kN) * sizeof(MomentSums), sums);
    ptx::sync_threads();
#pragma unroll
    for (int i = 0; i + 1 < kLanes && lane == 0; ++i) {
      const auto more =
          ptx::load_shared<MomentSums>(scratch + (i * Shape::kN + thread) * sizeof(MomentSums));
      sums.shifted += more.shifted;
      sums.squares += more.squares;
    }
  }
  const auto pixels = static_cast<double>(before(last) - before(first));
  const double m2 = sums.squares - sums.shifted * sums.shifted / pixels;
  return WideMoments{pivot + sums.shifted / pixels, m2 < 0.0 ? 0.0 : m2};
}

// Where a block's tile lies among those that are measured.
struct MeasuredColumn {
  uint32_t index;   // of the columns of tiles, over all groups
  int32_t channel;  // the tile's first one
  int32_t columns;  // that exist
};

// Behind the moments of this block's tile, which it has stored. `ring` and `scratch`: shared memory
// that nobody else uses any more, 16 bytes a thread and 4 bytes.
template <class Shape>
RF_DEVICE void merge_moments(const ConvBnStatsArguments& arguments, const MeasuredColumn& where,
                             int32_t tile, ptx::SharedAddress ring, ptx::SharedAddress scratch,
                             uint32_t thread) {
  const PixelTiles& measured = arguments.measured;
  const int32_t filters = arguments.channels * arguments.tiles.groups;
  const int32_t chunk = tile / kChunkTiles;
  const int32_t chunks = measured.chunks();
  uint32_t* arrivals = arguments.arrivals + where.index * static_cast<uint32_t>(chunks + 1);
  const int32_t first = measured.begin(chunk);
  const int32_t end = measured.begin(chunk + 1);
  if (!last_to_arrive(arrivals + chunk, end - first, scratch, thread)) return;

  const auto column = static_cast<int32_t>(thread % Shape::kN);
  const bool known = column < where.columns;
  const bool writes = known && thread < Shape::kN;
  // Of a column that does not exist the first one's, for nobody.
  const int64_t channel = where.channel + (known ? column : 0);
  WideMoments all = merge_parts<Shape>(
      first, end, ring, thread,
      [&](int32_t i) {
        return ptx::load_global(arguments.moments + int64_t{i} * filters + channel);
      },
      [&](int32_t i) { return measured.before(i); });
  if (chunks > 1) {
    if (writes) ptx::store_global(arguments.merged + int64_t{chunk} * filters + channel, all);
    if (!last_to_arrive(arrivals + chunks, chunks, scratch, thread)) return;
    all = merge_parts<Shape>(
        0, chunks, ring, thread,
        [&](int32_t i) {
          return ptx::load_global(arguments.merged + int64_t{i} * filters + channel);
        },
        [&](int32_t i) { return measured.before(measured.begin(i)); });
  }
  if (!writes) return;
  const auto mean = static_cast<float>(all.mean);
  // As torch's, whichever pixel the Inf is in: it has no mean.
  const bool finite = mean - mean == 0.0f;
  ptx::store_global(arguments.stats + channel, finite ? mean : mean - mean);
  ptx::store_global(arguments.stats + filters + channel, static_cast<float>(all.m2));
}

}  // namespace resnet_fused
