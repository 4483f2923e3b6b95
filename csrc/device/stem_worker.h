// What the workers of the stem's kernels for sm_90a do: two warps bring the image's rows, make
// 16-bit pixels of them and put them into a ring; a warpgroup multiplies a row of the convolution
// where the windows overlap in it (stem_warpgroup.h), and finishes the row before while the
// products run.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/proxy.h"
#include "../ptx/registers.h"
#include "dependent.h"
#include "pipeline.h"
#include "stem_rows.h"
#include "stem_stage.h"
#include "stem_warpgroup.h"
#include "warpgroup_tile.h"

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

// The warps that load for a worker. V: the image's elements. Walk: a StemWalk.
template <class V, class T, class Shape, class Walk>
class StemProducer {
 public:
  // norm: as of StemRows; thread: of the worker's.
  RF_DEVICE StemProducer(const StemArguments& arguments, const Ring<Shape::kPairs>& ring,
                         ptx::SharedAddress pairs, ptx::SharedAddress norm, const Walk& walk,
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
  Walk walk_;
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

  template <class Walk>
  static RF_DEVICE StemRow of(const Walk& walk) {
    const StemStrip& strip = walk.strip();
    return StemRow{strip.n,          strip.row + walk.step(),
                   strip.column,     strip.first_pooled,
                   walk.step() == 0, walk.last()};
  }
  // Pairs that it waits for, and those that are of no use behind it.
  RF_DEVICE int fresh() const { return first ? kStemPairsInUse : 1; }
  RF_DEVICE int used() const { return last ? kStemPairsInUse : 1; }
};

// The products of a worker's rows.
template <class T, class Shape>
class StemProducts {
  static_assert(kStemFilterLayout<Shape>.valid() && kStemBackLayout<Shape>.valid());

 public:
  using Sums = float[Shape::kColumns / 2];

  // filters: in shared memory, of the block; pairs: the ring, of the worker; lane: of the warp.
  RF_DEVICE StemProducts(ptx::SharedAddress filters, ptx::SharedAddress pairs,
                         const Ring<Shape::kPairs>& ring, uint32_t lane)
      : filters_(filters), pairs_(pairs), ring_(ring), lane_(lane) {}

  // finish(sums, row) of each row of a walk.
  template <class Walk, class Finish>
  RF_DEVICE void run(Walk walk, const Finish& finish) {
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
      if (walk.done()) return end(one, row, finish);
      row = turn(one, row, other, walk, finish);
      walk.next();
      if (walk.done()) return end(other, row, finish);
      row = turn(other, row, one, walk, finish);
    }
  }

 private:
  // Finishes a row, behind asking for the next one's products. The next one.
  template <class Walk, class Finish>
  RF_DEVICE StemRow turn(Sums& sums, const StemRow& row, Sums& following, const Walk& walk,
                         const Finish& finish) {
    const StemRow next = StemRow::of(walk);
    ask(following, next);
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_pin(sums);
    release(row);
    finish(sums, row);
    return next;
  }

  // The last one.
  template <class Finish>
  RF_DEVICE void end(Sums& sums, const StemRow& row, const Finish& finish) {
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

  ptx::SharedAddress filters_;
  ptx::SharedAddress pairs_;
  Ring<Shape::kPairs> ring_;
  RingPlace<Shape::kPairs> fresh_;
  RingPlace<Shape::kPairs> used_;
  uint32_t slot_ = 0;  // of the first pair of the row that is asked for next
  uint32_t lane_;
};

// A worker of a block, as produce and consume are told of it.
template <class Shape>
struct StemWorker {
  uint32_t index;
  Ring<Shape::kPairs> ring;
  ptx::SharedAddress pairs;
  uint32_t thread;  // of the worker's that produce, or that consume

  // Of those of all blocks: to the blocks' first workers, then to their second ones.
  RF_DEVICE int32_t of_all() const { return static_cast<int32_t>(index * gridDim.x + blockIdx.x); }
};

// By a whole block, which has begun to bring the vectors: filters from `first` on, barriers, and
// the roles. produce(worker) and consume(worker): of a StemWorker. kEarly: the launch may begin
// before the kernel ahead has ended.
template <class T, class Shape, bool kEarly, class Produce, class Consume>
RF_DEVICE void run_stem_workers(const StemArguments& arguments, uint32_t first,
                                ptx::SharedAddress shared, const Produce& produce,
                                const Consume& consume) {
  const uint32_t thread = threadIdx.x;
  // By a shuffle, so that ptxas knows it to be the same for all lanes.
  const uint32_t warp = ptx::shuffle(ptx::kWholeWarp, thread / 32, 0);
  const uint32_t warpgroup = warp / kWarpgroupWarps;
  const auto ring_of = [&](uint32_t of) {
    return Ring<Shape::kPairs>{shared + Shape::kBarriersAt + of * Shape::kBarriersBytes};
  };
  stem_stage_filters<T, Shape>(arguments, first, shared + Shape::kFiltersAt, thread);
  for (uint32_t i = 0; thread == 0 && i < kConsumers; ++i) {
    for (RingPlace<Shape::kPairs> at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(ring_of(i).full(at), kStemProducerWarps);
      ptx::mbarrier_init(ring_of(i).empty(at), kWarpgroupWarps);
    }
  }
  ptx::fence_proxy_async_shared();  // the filters
  ptx::sync_threads();
  if constexpr (kEarly) wait_for_ahead(arguments.dependent);
  const uint32_t worker = warpgroup == 0 ? warp / kStemProducerWarps : warpgroup - 1;
  const auto of = [&](uint32_t threads) {
    return StemWorker<Shape>{worker, ring_of(worker),
                             shared + Shape::kRingAt + worker * Shape::kRingBytes,
                             thread % threads};
  };
  if (warpgroup == 0) {
    ptx::decrease_registers<kStemProducerRegisters>();
    produce(of(kStemProducerThreads));
  } else {
    ptx::increase_registers<kStemConsumerRegisters>();
    consume(of(kWarpgroupThreads));
  }
}

#endif

}  // namespace resnet_fused
