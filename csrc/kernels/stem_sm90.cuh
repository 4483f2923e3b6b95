// The stem on the GPU, for sm_90a: convolution 7x7 with stride 2, BatchNorm, ReLU and max pooling
// 3x3 with stride 2 on wgmma, from the image to the pooled activation; stem_sm80.cuh has the
// formula.
//
// A block's two workers walk down strips of images, each by itself (stem_worker.h). The warpgroup
// that multiplies a row of the convolution pools the row before, as it lies in registers, while the
// products run. Of a thread's two filters the sums of columns 2p and 2p + 1 are neighbours; column
// 2p - 1 comes by a shuffle. What a window's rows above have left waits in registers too.
#pragma once

#include <cstdint>

#include "../device/stem_result.h"
#include "../device/stem_worker.h"
#include "../device/vector.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// What the warpgroup that multiplies makes of a row of the convolution.
template <class T, class Out, class Shape>
class StemConsumer {
  using Result = StemResult<Out>;
  using Sums = typename StemProducts<T, Shape>::Sums;

 public:
  // shared: of the block; staging_at: of the worker; thread: of the warpgroup.
  RF_DEVICE StemConsumer(const StemArguments& arguments, ptx::SharedAddress shared,
                         ptx::SharedAddress staging_at, uint32_t thread)
      : arguments_(arguments), lane_(thread % 32) {
    const uint32_t warp = thread / 32;
    const uint32_t filter = warp * 16 + lane_ / 4;  // and the eighth from there
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const ptx::SharedAddress factors = shared + (filter + 8 * side) * 4;
      scale_[side] = ptx::load_shared<float>(factors);
      shift_[side] = ptx::load_shared<float>(factors + Shape::kScaleBytes);
    }
    first_filter_ = static_cast<int32_t>(blockIdx.y * kStemFilters + warp * 16 + lane_ % 2 * 8);
    neighbour_ = static_cast<int>(lane_ / 4 * 4 + (lane_ + 3) % 4);
    // A word is two pooled columns, the second one four further. Of eight pixels and eight filters
    // stmatrix takes the words' lower halves for even rows, the upper ones for odd rows: pixel
    // 4 (i % 2) + i / 2 in row i. Pixels 4 to 7 have their filters' halves exchanged, so that
    // eight rows fill a line of banks.
    const ptx::SharedAddress staging = staging_at + warp * Shape::kStagingBytes;
    const uint32_t i = lane_ % 8, side = lane_ / 8 % 2;
    const uint32_t pixel = lane_ / 16 * 8 + i % 2 * 4 + i / 2;
    staged_ = staging + pixel * Shape::kPixelBytes + (side ^ i % 2) * kChunkBytes;
    stored_ = staging + lane_ / 2 * Shape::kPixelBytes + (lane_ ^ lane_ / 8) % 2 * kChunkBytes;
  }

  // Scale, shift and rounding, the largest of three columns, then of three rows. Columns that there
  // are not count as zeros, and so does the padding: no ReLU is less.
  RF_DEVICE void finish(const Sums& sums, const StemRow& row) {
    uint32_t odd[2][Shape::kWords];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int m = 0; m < Shape::kWords; ++m) odd[side][m] = pair_of(sums, side, 8 * m + 1);
    }
    if (row.column + Shape::kColumns > arguments_.conv_width) cut(odd, row.column);
    uint32_t best[2][Shape::kWords];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      uint32_t before = 0;
#pragma unroll
      for (int m = 0; m < Shape::kWords; ++m) {
        // Of the first lane of four the left neighbour is the fourth one's column of the eight
        // before.
        const uint32_t moved = ptx::shuffle(ptx::kWholeWarp, odd[side][m], neighbour_);
        const uint32_t left = lane_ % 4 == 0 ? before >> 16 | moved << 16 : moved;
        before = moved;
        const uint32_t own = larger(pair_of(sums, side, 8 * m), odd[side][m]);
        best[side][m] = larger(own, left);
        above_[side][m] = larger(row.first ? 0u : above_[side][m], best[side][m]);
      }
    }
    // The window's last row is the next one's first.
    if (row.row % 2 == 0 && row.row + 1 < arguments_.conv_height) return;
    if (row.row / 2 >= row.first_pooled) store(row);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int m = 0; m < Shape::kWords; ++m) above_[side][m] = larger(best[side][m], 0u);
    }
  }

 private:
  // Odd columns beyond the image become zeros; no even one counts that is not there.
  RF_DEVICE void cut(uint32_t (&odd)[2][Shape::kWords], int32_t column) const {
    // The thread's first is column 2t + 1 of the tile; a word's second one is eight further.
    const int32_t end = arguments_.conv_width - column - 2 * static_cast<int32_t>(lane_ % 4) - 1;
#pragma unroll
    for (int m = 0; m < Shape::kWords; ++m) {
      const uint32_t kept = 16 * m >= end ? 0u : 16 * m + 8 >= end ? 0xFFFFu : 0xFFFFFFFFu;
      odd[0][m] &= kept;
      odd[1][m] &= kept;
    }
  }

  // Results i and i + 4 of the first eight filters, or of the others.
  RF_DEVICE uint32_t pair_of(const Sums& sums, int side, int i) const {
    const int at = i + 2 * side;
    return Result::rounded(__builtin_fmaf(scale_[side], sums[at], shift_[side]),
                           __builtin_fmaf(scale_[side], sums[at + 4], shift_[side]));
  }
  static RF_DEVICE uint32_t larger(uint32_t a, uint32_t b) {
    return larger_pair<typename Result::Kept>(a, b);
  }

  // The warp's filters of a pooled row, by way of shared memory: 32 bytes of a pixel side by side.
  RF_DEVICE void store(const StemRow& row) const {
#pragma unroll
    for (int m = 0; m < Shape::kWords; m += 2) {
      const bool both = m + 1 < Shape::kWords;
      const uint32_t words[4] = {above_[0][m], above_[1][m], both ? above_[0][m + 1] : 0u,
                                 both ? above_[1][m + 1] : 0u};
      ptx::stmatrix_x4_trans(staged_ + m * 8 * Shape::kPixelBytes, words);
    }
    ptx::sync_warp();
    const int32_t left = arguments_.filters - first_filter_;
    Out* out = static_cast<Out*>(arguments_.out) +
               (row.n * arguments_.out_n + row.row / 2 * arguments_.out_h +
                first_filter_ * arguments_.out_c);
#pragma unroll
    for (int i = 0; i < Shape::kStagedPixels / 16; ++i) {
      const int32_t pixel = 16 * i + static_cast<int32_t>(lane_ / 2);
      const int32_t column = row.column / 2 + pixel;
      const auto filters =
          ptx::load_shared<Vector<uint32_t>>(stored_ + i * 16 * Shape::kPixelBytes);
      // The first one's left neighbour is another tile's.
      const bool whole = pixel > 0 || column == 0;
      if (!whole || pixel >= Shape::kPooled || column >= arguments_.out_width) continue;
      stem_store(out + column * arguments_.out_w, filters, arguments_, left);
    }
    ptx::sync_warp();  // the staging has been read
  }

  const StemArguments& arguments_;
  uint32_t lane_;
  int32_t first_filter_;  // of those that the lane stores
  int neighbour_;
  ptx::SharedAddress staged_;
  ptx::SharedAddress stored_;
  float scale_[2];
  float shift_[2];
  uint32_t above_[2][Shape::kWords] = {};
};

#endif

// Block (x, y): two workers, for the filters from 64 y on. Strips go to the blocks' first workers,
// then to their second ones. For any other architecture it is empty, and no plan chooses it.
template <class T, class Out, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    stem_wgmma_kernel(const __grid_constant__ StemArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t first = blockIdx.y * kStemFilters;
  using Worker = StemWorker<Shape>;
  const auto walk = [&](const Worker& worker, int32_t times, int32_t more) {
    const auto workers = static_cast<int32_t>(kConsumers * gridDim.x);
    return StemWalk({arguments, Shape::kColumns, worker.of_all(), workers}, times, more);
  };
  stem_stage_factors<Shape>(arguments, first, shared, threadIdx.x);
  run_stem_workers<T, Shape, true>(
      arguments, first, shared,
      [&](const Worker& worker) {
        const auto run = [&]<class V>() {
          StemProducer<V, T, Shape, StemWalk>(arguments, worker.ring, worker.pairs,
                                              shared + 2 * Shape::kScaleBytes,
                                              walk(worker, 2, kStemPairsInUse - 1), worker.thread)
              .run();
        };
        switch (arguments.image) {
          case StemImage::kBytes:
            return run.template operator()<uint8_t>();
          case StemImage::kFloat:
            return run.template operator()<float>();
          case StemImage::kWeights:
            return run.template operator()<T>();
        }
      },
      [&](const Worker& worker) {
        const ptx::SharedAddress staging =
            shared + Shape::kStagingAt + worker.index * kWarpgroupWarps * Shape::kStagingBytes;
        StemConsumer<T, Out, Shape> consumer(arguments, shared, staging, worker.thread);
        StemProducts<T, Shape>(shared + Shape::kFiltersAt, worker.pairs, worker.ring,
                               worker.thread % 32)
            .run(walk(worker, 1, 0),
                 [&](const auto& sums, const StemRow& row) { consumer.finish(sums, row); });
      });
#endif
}

}  // namespace resnet_fused
