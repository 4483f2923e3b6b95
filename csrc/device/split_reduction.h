// Split reductions: blocks that share a tile leave their sums in a workspace, and the last of them
// adds all up, always in the same order, so that a call gives the same bits each time.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "conv_geometry.h"
#include "main_loop.h"
#include "vector.h"

namespace resnet_fused {

// Whether this block is the tile's last one; then `sums` are the whole tile's. `scratch`: 4 bytes
// of shared memory that nobody else uses any more.
template <class Shape>
RF_DEVICE bool merge_splits(Sums<Shape>& sums, const SplitWorkspace& workspace, uint32_t tile,
                            int split, int splits, ptx::SharedAddress scratch, uint32_t thread) {
  constexpr int kColumns = 2 * Shape::kBlocksN;
  constexpr int kValues = Shape::kBlocksM * kColumns;  // vectors of four sums a thread
  const auto partial_of = [&](int part) {
    const int64_t first = (static_cast<int64_t>(tile) * splits + part) * kValues;
    return reinterpret_cast<Vector<float>*>(workspace.partial) + first * Shape::kThreads + thread;
  };
  Vector<float>* mine = partial_of(split);
#pragma unroll
  for (int i = 0; i < Shape::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float (&sum)[4] = sums.value[i][j];
      ptx::store_global(mine + (i * kColumns + j) * Shape::kThreads,
                        Vector<float>{{sum[0], sum[1], sum[2], sum[3]}});
    }
  }
  // Every thread's partial sums are seen by whoever sees this block's arrival, and the last one to
  // arrive sees those of all: release by fence and barrier, acquire by barrier and fence.
  ptx::fence_acq_rel_gpu();
  ptx::sync_threads();
  if (thread == 0) {
    ptx::store_shared(scratch, ptx::atomic_add_acq_rel(workspace.arrivals + tile, 1u));
  }
  ptx::sync_threads();
  const auto before = ptx::load_shared<uint32_t>(scratch);
  if (before + 1 != static_cast<uint32_t>(splits)) return false;
  ptx::fence_acq_rel_gpu();
  // Nobody else comes: as the next launch wants it.
  if (thread == 0) ptx::store_global(workspace.arrivals + tile, 0u);

  sums.clear();
  for (int part = 0; part < splits; ++part) {
    const Vector<float>* from = partial_of(part);
#pragma unroll
    for (int i = 0; i < Shape::kBlocksM; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Vector<float> value = ptx::load_global(from + (i * kColumns + j) * Shape::kThreads);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.value[i][j][e] += value.lane[e];
      }
    }
  }
  ptx::sync_threads();  // `scratch` has been read by all
  return true;
}

}  // namespace resnet_fused
