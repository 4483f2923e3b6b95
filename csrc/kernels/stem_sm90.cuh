// The stem on the GPU, for sm_90a: convolution 7x7 with stride 2, BatchNorm, ReLU and max pooling
// 3x3 with stride 2 on wgmma, from the image to the pooled activation; stem_sm80.cuh has the
// formula.
//
// A block's two workers walk down strips of images, each by itself: two warps load the image's
// rows, make 16-bit pixels of them and put them into a ring; a warpgroup multiplies a row of the
// convolution where the windows overlap in it (stem_warpgroup.h) and pools the row before, as it
// lies in registers, while the products run. Of a thread's two filters the sums of columns 2p and
// 2p + 1 are neighbours; column 2p - 1 comes by a shuffle. What a window's rows above have left
// waits in registers too.
#pragma once

#include <cstdint>

#include "../device/dependent.h"
#include "../device/pipeline.h"
#include "../device/stem_result.h"
#include "../device/stem_rows.h"
#include "../device/stem_stage.h"
#include "../device/stem_warpgroup.h"
#include "../device/vector.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/registers.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

constexpr int kStemCoreBytes = 8 * kChunkBytes;  // to the next eight filters, or columns
// Filters; the first two chunks of the windows; their last two.
template <class Shape>
constexpr ptx::MatrixLayout kStemFilterLayout{ptx::Swizzle::kNone, Shape::kChunkPitch,
                                              kStemCoreBytes};
constexpr ptx::MatrixLayout kStemFrontLayout{ptx::Swizzle::kNone, kChunkBytes, kStemCoreBytes};
static_assert(kStemFrontLayout.valid());
template <class Shape>
constexpr ptx::MatrixLayout kStemBackLayout{ptx::Swizzle::kNone, Shape::kTailsAt + kChunkBytes,
                                            kStemCoreBytes};

// The warps that load for a worker. V: the image's elements.
template <class V, class T, class Shape>
class StemProducer {
 public:
  // norm: as of StemRows; thread: of the worker's.
  RF_DEVICE StemProducer(const StemArguments& arguments, const Ring<Shape::kPairs>& ring,
                         ptx::SharedAddress pairs, ptx::SharedAddress norm, const StemWalk& walk,
                         uint32_t thread)
      : ring_(ring), pairs_(pairs), walk_(walk), rows_(arguments, norm, thread) {}

  // Three rows are on their way.
  RF_DEVICE void run() {
    if (walk_.done()) return;
    StemUnits<Shape> units[3];
    issue(units[0]);
    issue(units[1]);
    while (turn(units[0], units[2]) && turn(units[1], units[0]) && turn(units[2], units[1])) {
    }
  }

 private:
  RF_DEVICE void issue(StemUnits<Shape>& units) {
    if (walk_.step() == 0) rows_.enter(walk_.strip());
    rows_.issue(units);
    walk_.next();
    ++flying_;
  }

  // Lands a row, behind asking for the one after the next. Whether one is left.
  RF_DEVICE bool turn(const StemUnits<Shape>& now, StemUnits<Shape>& free) {
    if (!walk_.done()) issue(free);
    if (!odd_) ptx::mbarrier_wait_parity(ring_.empty(at_), at_.parity ^ 1);
    rows_.land(now, pairs_ + at_.stage * Shape::kPairBytes + (odd_ ? Shape::kRowBytes : 0));
    if (odd_) ptx::fence_proxy_async_shared();
    ptx::sync_warp();  // also lanes that had no chunk of it
    if (odd_) {
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring_.full(at_));
      at_.next();
    }
    odd_ = !odd_;
    return --flying_ > 0;
  }

  Ring<Shape::kPairs> ring_;
  RingPlace<Shape::kPairs> at_;
  ptx::SharedAddress pairs_;
  StemWalk walk_;
  StemRows<V, T, Shape> rows_;
  bool odd_ = false;  // the second row of its pair is to land
  int flying_ = 0;
};

// A row of the convolution, and what becomes of it.
struct StemRow {
  int32_t n;
  int32_t row;
  int32_t column;  // the tile's first
  int32_t first_pooled;
  bool first;  // of its strip
  bool last;

  static RF_DEVICE StemRow of(const StemWalk& walk) {
    const StemStrip& strip = walk.strip();
    return StemRow{strip.n,          strip.row + walk.step(),
                   strip.column,     strip.first_pooled,
                   walk.step() == 0, walk.last()};
  }
  // Pairs that it waits for, and those that are of no use behind it.
  RF_DEVICE int fresh() const { return first ? kStemPairsInUse : 1; }
  RF_DEVICE int used() const { return last ? kStemPairsInUse : 1; }
};

// The warpgroup that multiplies for a worker.
template <class T, class Out, class Shape>
class StemConsumer {
  using Result = StemResult<Out>;
  static_assert(kStemFilterLayout<Shape>.valid() && kStemBackLayout<Shape>.valid());

 public:
  using Sums = float[Shape::kColumns / 2];

  // shared: of the block; ring_at, staging_at: of the worker; thread: of the warpgroup.
  RF_DEVICE StemConsumer(const StemArguments& arguments, ptx::SharedAddress shared,
                         ptx::SharedAddress ring_at, ptx::SharedAddress staging_at,
                         const Ring<Shape::kPairs>& ring, uint32_t thread)
      : arguments_(arguments),
        filters_(shared + Shape::kFiltersAt),
        pairs_(ring_at),
        ring_(ring),
        lane_(thread % 32) {
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

  RF_DEVICE void run(StemWalk walk) {
    if (walk.done()) return;
    Sums one, other;
    clear(one);
    clear(other);
    StemRow row = StemRow::of(walk);
    ask(one, row);
    // ptxas follows the products through the loop where each array is in flight at one place of it
    // always, or never.
    while (true) {
      walk.next();
      if (walk.done()) return end(one, row);
      row = turn(one, row, other, walk);
      walk.next();
      if (walk.done()) return end(other, row);
      row = turn(other, row, one, walk);
    }
  }

 private:
  // Pools a row, behind asking for the next one's products. The next one.
  RF_DEVICE StemRow turn(Sums& sums, const StemRow& row, Sums& following, const StemWalk& walk) {
    const StemRow next = StemRow::of(walk);
    ask(following, next);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_pin(sums);
    release(row);
    finish(sums, row);
    return next;
  }

  // The last one.
  RF_DEVICE void end(Sums& sums, const StemRow& row) {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(sums);
    finish(sums, row);
  }

  RF_DEVICE void release(const StemRow& row) {
    if (lane_ != 0) return;
    for (int i = 0; i < row.used(); ++i, used_.next()) ring_.release(used_);
  }

  // Asks for the products of a row, and waits for what they read.
  RF_DEVICE void ask(Sums& sums, const StemRow& row) {
    for (int i = 0; i < row.fresh(); ++i, fresh_.next()) ring_.wait(fresh_);
    ptx::wgmma_pin(sums);
    ptx::wgmma_fence();
    const auto filters = ptx::matrix_descriptor(filters_, kStemFilterLayout<Shape>);
#pragma unroll
    for (int r = 0; r < kStemTaps; ++r) {
      const uint32_t slot = (slot_ + r / 2) % Shape::kPairs;
      const ptx::SharedAddress from = pairs_ + slot * Shape::kPairBytes + r % 2 * Shape::kRowBytes;
      const auto a = filters + r * kStemWindowChunks * Shape::kChunkPitch;
      ptx::wgmma<ProductType<T>>(sums, a, ptx::matrix_descriptor(from, kStemFrontLayout), r > 0);
      ptx::wgmma<ProductType<T>>(
          sums, a + 2 * Shape::kChunkPitch,
          ptx::matrix_descriptor(from + 2 * kChunkBytes, kStemBackLayout<Shape>), true);
    }
    ptx::wgmma_commit_group();
    slot_ += row.used();
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
  ptx::SharedAddress filters_;
  ptx::SharedAddress pairs_;
  Ring<Shape::kPairs> ring_;
  RingPlace<Shape::kPairs> fresh_;
  RingPlace<Shape::kPairs> used_;
  uint32_t slot_ = 0;  // of the first pair of the row that is asked for next
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
  const uint32_t thread = threadIdx.x;
  // By a shuffle, so that ptxas knows it to be the same for all lanes.
  const uint32_t warp = ptx::shuffle(ptx::kWholeWarp, thread / 32, 0);
  const uint32_t warpgroup = warp / kWarpgroupWarps;
  const uint32_t worker = warpgroup == 0 ? warp / kStemProducerWarps : warpgroup - 1;
  const ptx::SharedAddress pairs = shared + Shape::kRingAt + worker * Shape::kRingBytes;
  const auto barriers_of = [&](uint32_t of) {
    return Ring<Shape::kPairs>{shared + Shape::kBarriersAt + of * Shape::kBarriersBytes};
  };
  const Ring<Shape::kPairs> ring = barriers_of(worker);
  stem_stage_factors<Shape>(arguments, blockIdx.y * kStemFilters, shared, thread);
  stem_stage_filters<T, Shape>(arguments, blockIdx.y * kStemFilters, shared + Shape::kFiltersAt,
                               thread);
  for (uint32_t i = 0; thread == 0 && i < kConsumers; ++i) {
    for (RingPlace<Shape::kPairs> at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(barriers_of(i).full(at), kStemProducerWarps);
      ptx::mbarrier_init(barriers_of(i).empty(at), kWarpgroupWarps);
    }
  }
  ptx::fence_proxy_async_shared();  // the filters
  ptx::sync_threads();
  wait_for_ahead(arguments.dependent);
  const auto walk = [&](int32_t times, int32_t more) {
    return StemWalk(arguments, Shape::kColumns,
                    static_cast<int32_t>(worker * gridDim.x + blockIdx.x),
                    static_cast<int32_t>(kConsumers * gridDim.x), times, more);
  };
  if (warpgroup == 0) {
    ptx::decrease_registers<kStemProducerRegisters>();
    const auto run = [&]<class V>() {
      StemProducer<V, T, Shape>(arguments, ring, pairs, shared + 2 * Shape::kScaleBytes,
                                walk(2, kStemPairsInUse - 1), thread % kStemProducerThreads)
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
  } else {
    ptx::increase_registers<kStemConsumerRegisters>();
    const ptx::SharedAddress staging =
        shared + Shape::kStagingAt + worker * kWarpgroupWarps * Shape::kStagingBytes;
    StemConsumer<T, Out, Shape>(arguments, shared, pairs, staging, ring, thread % kWarpgroupThreads)
        .run(walk(1, 0));
  }
#endif
}

}  // namespace resnet_fused
