// What tiles have left of a channel becomes one value of all its pixels, in a fixed order whichever
// blocks do it: the last block of each chunk of tiles merges the chunk, and the last of these the
// chunks.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "tile_chunks.h"

namespace resnet_fused {

// Those who merge a column wait for each other: all threads of a block, or whom the shape names.
template <class Shape>
RF_DEVICE void meet() {
  if constexpr (requires { Shape::meet(); }) {
    Shape::meet();
  } else {
    ptx::sync_threads();
  }
}

// Whether these threads are the last ones of `blocks` that arrive at a counter; then they may read
// what all of them wrote before. `scratch`: 4 bytes of shared memory that nobody else uses.
template <class Shape>
RF_DEVICE bool last_to_arrive(uint32_t* counter, int32_t blocks, ptx::SharedAddress scratch,
                              uint32_t thread) {
  ptx::fence_acq_rel_gpu();
  meet<Shape>();
  if (thread == 0) ptx::store_shared(scratch, ptx::atomic_add_acq_rel(counter, 1u));
  meet<Shape>();
  if (ptx::load_shared<uint32_t>(scratch) + 1 != static_cast<uint32_t>(blocks)) return false;
  ptx::fence_acq_rel_gpu();
  return true;
}

// Of the parts first <= i < last of this thread's column, together with the other threads of that
// column, kLanes of them, who meet in shared memory at `scratch`, 16 bytes a thread. load(i): part
// i; add(sums, i, part). The result is the first thread's, thread < kN.
template <class Shape, class Load, class Add>
RF_DEVICE ColumnSums sum_parts(int32_t first, int32_t last, ptx::SharedAddress scratch,
                               uint32_t thread, const Load& load, const Add& add) {
  constexpr int kLanes = Shape::kThreads / Shape::kN;
  constexpr int kAtOnce = 8;  // loads under way
  static_assert(Shape::kThreads % Shape::kN == 0);
  const auto lane = static_cast<int32_t>(thread / Shape::kN);
  ColumnSums sums{};
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
      if (at < last) add(sums, at, part[i]);
    }
  }
  if constexpr (kLanes > 1) {
    if (lane > 0) ptx::store_shared(scratch + (thread - Shape::kN) * sizeof(ColumnSums), sums);
    meet<Shape>();
#pragma unroll
    for (int i = 0; i + 1 < kLanes && lane == 0; ++i) {
      const auto more =
          ptx::load_shared<ColumnSums>(scratch + (i * Shape::kN + thread) * sizeof(ColumnSums));
      sums.first += more.first;
      sums.second += more.second;
    }
  }
  return sums;
}

// Behind what this block has left of its tile. `arrivals`: of the tile's column, a counter for each
// chunk and one for the chunks. of_tiles(first, last): their value; keep(chunk, value) stores it
// for of_chunks(count); finish(value) is the last block's.
template <class Shape, class OfTiles, class Keep, class OfChunks, class Finish>
RF_DEVICE void merge_chunks(uint32_t* arrivals, const TileChunks& all, int32_t tile,
                            ptx::SharedAddress scratch, uint32_t thread, const OfTiles& of_tiles,
                            const Keep& keep, const OfChunks& of_chunks, const Finish& finish) {
  const int32_t chunk = tile / kChunkTiles;
  const int32_t chunks = all.count();
  const int32_t first = all.begin(chunk);
  const int32_t end = all.begin(chunk + 1);
  if (!last_to_arrive<Shape>(arrivals + chunk, end - first, scratch, thread)) return;
  auto merged = of_tiles(first, end);
  if (chunks > 1) {
    keep(chunk, merged);
    if (!last_to_arrive<Shape>(arrivals + chunks, chunks, scratch, thread)) return;
    merged = of_chunks(chunks);
  }
  finish(merged);
}

}  // namespace resnet_fused
